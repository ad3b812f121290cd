"""Rejection sampling (report section 5.1, R1 section 2.3.3): several completions of each problem, scored, some kept.

What is kept is data for fine-tuning. With a stronger model as the one that samples, the same is distillation.
"""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from dsv3_jax.data import Tokenizer
from dsv3_jax.errors import ConfigError
from dsv3_jax.inference import Engine, Request, Sampler
from dsv3_jax.inference.requests import Result
from dsv3_jax.post_training.rewards import Reward
from dsv3_jax.post_training.tasks import Problem

Keep = Literal["shortest-right", "best", "all"]
KEEP_RULES: tuple[Keep, ...] = ("shortest-right", "best", "all")


@dataclasses.dataclass(frozen=True)
class Completion:
    """A completion of a problem.

    Attributes:
      text: without the token that ended it.
      ids: its tokens, that one included.
      logprobs: log-probability with which each token was drawn; empty unless asked for.
      experts: int32 [MoE layers, K] for each token that the model read, those of the prompt first: the experts it
        chose. Empty unless the engine records them.
      cut: whether it was cut at the length limit.
      scores: each part of the reward, unweighted, and "reward", their weighted sum.
    """

    text: str
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    experts: tuple[np.ndarray, ...] = dataclasses.field(compare=False)
    cut: bool
    scores: dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How completions are drawn.

    Attributes:
      samples: completions of each problem.
      max_new_tokens: most tokens of a completion.
      sampler: how tokens are chosen.
      seed: of all draws; the draws of a completion depend on it, the prompt and the completion's number alone.
      logprobs: whether completions come with the log-probabilities of their tokens.
      reward: parts and weights; without any, a problem's own reward counts.
    """

    samples: int = 4
    max_new_tokens: int = 64
    sampler: Sampler = dataclasses.field(default_factory=Sampler)
    seed: int = 0
    logprobs: bool = False
    reward: Reward | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.samples <= 10_000:
            raise ConfigError(f"samples must be from 1 to 10,000, not {self.samples}")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed must be from 0 to 4,294,967,295, not {self.seed}")


def sample(
    engine: Engine, tokenizer: Tokenizer, problems: Sequence[Problem], config: SamplingConfig
) -> Iterator[tuple[Problem, list[Completion]]]:
    """Yields each problem with its scored completions, in order; all of them are drawn before the first is scored.

    Raises:
      UserError: a prompt does not fit the engine, or a reward cannot be computed on this machine.
    """
    results = itertools.batched(engine.run(requests_for(tokenizer, problems, config)), config.samples)
    for problem, some in zip(problems, list(results), strict=True):
        yield problem, score(tokenizer, [(problem, result) for result in some], config.reward)


def requests_for(tokenizer: Tokenizer, problems: Sequence[Problem], config: SamplingConfig) -> list[Request]:
    """Returns the requests for `config.samples` completions of each problem, one problem after the other."""
    return [
        Request(
            prompt=tuple(tokenizer.prompt_ids(problem.prompt)),
            max_new_tokens=config.max_new_tokens,
            sampler=config.sampler,
            seed=_seed(config.seed, problem.prompt, number),
            stop_tokens=tuple(tokenizer.end_ids),
            top_logprobs=0 if config.logprobs else None,
        )
        for problem in problems
        for number in range(config.samples)
    ]


def score(tokenizer: Tokenizer, answered: Sequence[tuple[Problem, Result]], reward: Reward | None) -> list[Completion]:
    """Returns what the engine wrote for each problem with its scores; without a `reward`, a problem's own counts."""
    ended = [result.finished == "stop" for _, result in answered]
    texts = [
        tokenizer.decode(result.tokens[:-1] if end else result.tokens)
        for (_, result), end in zip(answered, ended, strict=True)
    ]
    items = [(problem.prompt, text, problem.answer) for (problem, _), text in zip(answered, texts, strict=True)]
    if reward is None:
        own = [Reward(((problem.reward, 1.0),)) for problem, _ in answered]
        scores = [rule.score(*item) for rule, item in zip(own, items, strict=True)]
    else:
        scores = reward.score_all(items)
    return [
        Completion(
            text=text,
            ids=tuple(result.tokens),
            logprobs=tuple(each.logprob for each in result.logprobs),
            experts=tuple(result.experts),
            cut=not end,
            scores=values,
        )
        for (_, result), text, end, values in zip(answered, texts, ended, scores, strict=True)
    ]


def keep(completions: Sequence[Completion], rule: Keep, least: float) -> list[Completion]:
    """Returns the completions that a rule keeps; those below the `least` reward never are, except by "all".

    "shortest-right" keeps the shortest one, "best" the one with the largest reward (of equals the shortest).
    """
    if rule == "all":
        return list(completions)
    good = [completion for completion in completions if completion.scores["reward"] >= least]
    if not good:
        return []
    if rule == "shortest-right":
        return [min(good, key=lambda completion: len(completion.ids))]
    return [max(good, key=lambda completion: (completion.scores["reward"], -len(completion.ids)))]


def _seed(seed: int, prompt: str, number: int) -> int:
    """Returns a 64-bit seed; the number goes in last, so that all completions of a prompt differ."""
    return seed << 32 | (zlib.crc32(prompt.encode()) + number * 0x9E3779B1) % 2**32
