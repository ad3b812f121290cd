"""Self-rewarding (report section 5.4.2): a model votes on whether completions are good under a written constitution.

The model reads the constitution, a problem and a completion, and writes its verdict several times, each drawn at
temperature 1. The reward is the share of "yes" among the verdicts. The model may be the policy that is trained, whose
weights are then those of the moment, or another run.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from dsv3_jax.data import Tokenizer
from dsv3_jax.inference import Engine
from dsv3_jax.post_training.rejection import SamplingConfig, requests_for
from dsv3_jax.post_training.rewards import Item
from dsv3_jax.post_training.tasks import Problem

_VERDICT = re.compile(r"\b(yes|no)\b", re.IGNORECASE)


def judgement_prompt(constitution: str, prompt: str, completion: str) -> str:
    """Returns what a judge reads before it writes "yes" or "no"."""
    return f"{constitution}\nProblem: {prompt}\nAnswer: {completion}\nIs the answer good? "


def share_of_yes(verdicts: Sequence[str]) -> float:
    """Returns the share of "yes" among the verdicts; the first "yes" or "no" in a text counts.

    Texts with neither are left out; where there is no other, the result is 0.5.
    """
    found = [match.group().lower() == "yes" for match in map(_VERDICT.search, verdicts) if match]
    return sum(found) / len(found) if found else 0.5


class Judge:
    """A reward from 0 to 1 that a model gives by voting.

    Args:
      engine: writes the verdicts; it must be idle when the judge is asked.
      tokenizer: that of the engine's model.
      constitution: what is good.
      votes: verdicts on each completion.
      max_new_tokens: most tokens of a verdict.
    """

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, constitution: str, votes: int, max_new_tokens: int = 8
    ) -> None:
        self._engine, self._tokenizer, self._constitution = engine, tokenizer, constitution
        self._sampling = SamplingConfig(samples=votes, max_new_tokens=max_new_tokens)

    def __call__(self, items: Sequence[Item]) -> list[float]:
        """Returns the reward of each (prompt, completion, answer); the answer is not read.

        Verdicts depend on the weights and the texts alone, so that a resumed run draws the same.

        Raises:
          UserError: constitution, prompt and completion together do not fit the model's context.
        """
        texts = [judgement_prompt(self._constitution, prompt, completion) for prompt, completion, _ in items]
        different = list(dict.fromkeys(texts))
        problems = [Problem(text, "", "") for text in different]
        results = self._engine.run(requests_for(self._tokenizer, problems, self._sampling))
        verdicts = [self._tokenizer.decode(result.tokens) for result in results]
        shares = map(share_of_yes, itertools.batched(verdicts, self._sampling.samples))
        found = dict(zip(different, shares, strict=True))
        return [found[text] for text in texts]
