"""Rollouts: groups of completions of the same prompt, drawn by the engine and scored, as arrays for the update."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dsv3_jax.bounds import LARGEST_COUNT, check_bounds
from dsv3_jax.data import Tokenizer
from dsv3_jax.inference import GREEDY, Engine, Sampler
from dsv3_jax.inference.requests import Result
from dsv3_jax.post_training.grpo import Completions, group_advantages
from dsv3_jax.post_training.policy_step import Texts
from dsv3_jax.post_training.rejection import Completion, SamplingConfig, requests_for, score
from dsv3_jax.post_training.rewards import JudgeConfig, Reward
from dsv3_jax.post_training.tasks import Problem, TaskSize

_SMALLEST_LENGTH = 16  # tokens of the smallest padded row


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """What is asked and how completions are drawn. They are drawn at temperature 1 from the whole distribution.

    Attributes:
      task: a kind of generated problems, or a file of JSON lines with prompt, answer and reward.
      size: how hard generated problems are.
      reward: sum of rewards such as "numeric+0.1*format"; each problem's own if empty.
      judge: how the judges vote that `reward` names.
      prompts: problems of a step.
      group: G, completions of each problem.
      max_new_tokens: most tokens of a completion.
      overlong_penalty: subtracted from the reward of a completion that was cut at `max_new_tokens`.
      seed: of problems and draws.
    """

    task: str = "arithmetic"
    size: TaskSize = dataclasses.field(default_factory=TaskSize)
    reward: str = ""
    judge: JudgeConfig = dataclasses.field(default_factory=JudgeConfig)
    prompts: int = 16
    group: int = 8
    max_new_tokens: int = 64
    overlong_penalty: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        bounds = {"prompts": (1, LARGEST_COUNT), "group": (2, 10_000), "max_new_tokens": (1, 2**24)}
        check_bounds(self, bounds | {"overlong_penalty": (0.0, 1e6), "seed": (0, 2**32 - 1)})
        self.rule()  # refuses a wrong reward here, not at the first step

    def rule(self) -> Reward | None:
        """Returns the reward of all problems, or None where each has its own.

        Raises:
          ConfigError: a part has no such name or weight.
        """
        return Reward.of(self.reward) if self.reward else None


@dataclasses.dataclass(frozen=True)
class Rollout:
    """The scored completions of one step: Q problems with G completions each, N = Q G rows.

    Attributes:
      problems: the problems.
      prompts: tokens of each problem's prompt.
      groups: the completions of each problem.
      penalty: what a cut completion's reward is lowered by.
      seconds_drawing, seconds_scoring: time the engine and the rewards took.
    """

    problems: tuple[Problem, ...]
    prompts: tuple[tuple[int, ...], ...]
    groups: tuple[tuple[Completion, ...], ...]
    penalty: float
    seconds_drawing: float
    seconds_scoring: float

    @property
    def completions(self) -> list[Completion]:
        """All completions, group after group."""
        return [completion for group in self.groups for completion in group]

    def rewards(self) -> Float[np.ndarray, "Q G"]:
        """Returns the rewards, lowered by the penalty where a completion was cut."""
        values = [[each.scores["reward"] - self.penalty * each.cut for each in group] for group in self.groups]
        return np.asarray(values, np.float32)

    def scores(self) -> dict[str, float]:
        """Returns the mean of each part of the reward over the completions that it was computed for."""
        found: dict[str, list[float]] = {}
        for completion in self.completions:
            for name, value in completion.scores.items():
                found.setdefault(name, []).append(value)
        return {name: float(np.mean(values)) for name, values in found.items()}

    def batch(self, *, divide_by_deviation: bool, experts: bool, context_ranks: int = 1) -> tuple[Texts, Completions]:
        """Returns the rows as numpy arrays with one pass, [1, N, ...].

        Args:
          divide_by_deviation: as of `group_advantages`.
          experts: whether the engine's experts come along.
          context_ranks: number of shards of a row. The tokens of a row but the last one are a multiple of it.
        """
        prompts = [prompt for prompt, group in zip(self.prompts, self.groups, strict=True) for _ in group]
        rows = self.completions
        length = _padded(max(len(prompt) + len(row.ids) for prompt, row in zip(prompts, rows, strict=True)))
        length += -(length - 1) % context_ranks
        tokens = np.zeros((len(rows), length), np.int32)
        lengths = np.zeros(len(rows), np.int32)
        mask = np.zeros((len(rows), length - 1), bool)
        drawn = np.zeros((len(rows), length - 1), np.float32)
        chosen = np.zeros((len(rows), length - 1, *rows[0].experts[0].shape), np.int16) if experts else None
        for index, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
            start, stop = len(prompt), len(prompt) + len(row.ids)
            tokens[index, :stop] = (*prompt, *row.ids)
            lengths[index] = stop
            mask[index, start - 1 : stop - 1] = True
            drawn[index, start - 1 : stop - 1] = row.logprobs
            if chosen is not None:
                chosen[index, : stop - 1] = np.stack(row.experts)
        advantages = group_advantages(jnp.asarray(self.rewards()), divide_by_deviation=divide_by_deviation)
        completions = Completions(
            mask=mask,  # pyright: ignore[reportArgumentType]
            advantages=np.asarray(advantages).reshape(-1),  # pyright: ignore[reportArgumentType]
            old=None,
            drawn=drawn,  # pyright: ignore[reportArgumentType]
            reference=None,
            overlong=np.asarray([row.cut for row in rows]),  # pyright: ignore[reportArgumentType]
        )
        texts = Texts(tokens, lengths, chosen)  # pyright: ignore[reportArgumentType]
        return jax.tree.map(lambda leaf: leaf[None], (texts, completions))

    def equal_groups(self) -> int:
        """Returns how many groups have equal rewards, which no gradient comes from."""
        return int(np.sum(np.ptp(self.rewards(), axis=1) == 0))


def joined_rollouts(parts: Sequence[Rollout]) -> Rollout:
    """Returns the rollouts of several processes for the same step as one. The slowest of them tells the times."""
    return Rollout(
        problems=tuple(problem for part in parts for problem in part.problems),
        prompts=tuple(prompt for part in parts for prompt in part.prompts),
        groups=tuple(group for part in parts for group in part.groups),
        penalty=parts[0].penalty,
        seconds_drawing=max(part.seconds_drawing for part in parts),
        seconds_scoring=max(part.seconds_scoring for part in parts),
    )


def draw_rollout(
    engine: Engine,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    config: RolloutConfig,
    *,
    step: int,
    rule: Reward | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Rollout | None:
    """Draws and scores the completions of a step; the same step of the same policy gives the same completions.

    Args:
      step: number of the step; with the seed it decides the draws.
      rule: the reward with its models loaded; that of `config` unless given.
      stop: is asked from time to time whether to give up.

    Returns:
      The rollout; None after `stop` returned True.
    """
    sampling = SamplingConfig(
        samples=config.group,
        max_new_tokens=config.max_new_tokens,
        sampler=Sampler(),
        seed=(config.seed + 0x9E3779B1 * step) % 2**32,
        logprobs=True,
    )
    began = time.perf_counter()
    results = _run(engine, tokenizer, problems, sampling, stop)
    if results is None:
        return None
    drawn = time.perf_counter()
    asked = [problem for problem in problems for _ in range(config.group)]
    completions = score(tokenizer, list(zip(asked, results, strict=True)), rule or config.rule())
    groups = tuple(itertools.batched(completions, config.group))
    return Rollout(
        problems=tuple(problems),
        prompts=tuple(tuple(tokenizer.prompt_ids(problem.prompt)) for problem in problems),
        groups=groups,
        penalty=config.overlong_penalty,
        seconds_drawing=drawn - began,
        seconds_scoring=time.perf_counter() - drawn,
    )


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The result on held-out problems, each answered once by the most likely tokens.

    Attributes:
      right: number of problems whose own reward is 1.
      tokens: number of tokens of all completions.
      count: number of problems.
    """

    right: int
    tokens: int
    count: int

    @property
    def accuracy(self) -> float:
        """Share of the problems that were answered rightly."""
        return self.right / self.count

    @property
    def length(self) -> float:
        """Mean number of tokens of a completion."""
        return self.tokens / self.count

    def __add__(self, other: HeldOut) -> HeldOut:
        """Returns the result on the problems of both."""
        return HeldOut(self.right + other.right, self.tokens + other.tokens, self.count + other.count)


def answer_held_out(
    engine: Engine,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    max_new_tokens: int,
    stop: Callable[[], bool] = lambda: False,
) -> HeldOut | None:
    """Returns the result on held-out problems; None after `stop` returned True."""
    results = _run(
        engine, tokenizer, problems, SamplingConfig(samples=1, max_new_tokens=max_new_tokens, sampler=GREEDY), stop
    )
    if results is None:
        return None
    rows = score(tokenizer, list(zip(problems, results, strict=True)), None)
    right = sum(row.scores["reward"] >= 1 for row in rows)
    return HeldOut(right, sum(len(row.ids) for row in rows), len(rows))


def _run(
    engine: Engine,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    sampling: SamplingConfig,
    stop: Callable[[], bool],
) -> list[Result] | None:
    """Serves the requests of `problems` to their end; None after `stop` returned True, with the engine empty again."""
    results = {engine.submit(request): Result() for request in requests_for(tokenizer, problems, sampling)}
    while engine.has_work:
        if stop():
            for number in results:
                engine.cancel(number)
            return None
        for output in engine.step():
            results[output.request_id].add(output)
    return list(results.values())


def _padded(length: int) -> int:
    """Returns the length of padded rows: a power of two or the number halfway to the next, so that few are compiled."""
    power = 2 ** max(math.ceil(math.log2(length)), int(math.log2(_SMALLEST_LENGTH)))
    return power * 3 // 4 if length <= power * 3 // 4 else power
