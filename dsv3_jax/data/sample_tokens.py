"""Samples of fine-tuning data as tokens, each with whether it is learned; samples that cannot be used are counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Int64

from dsv3_jax.data.chat_template import ChatTemplate, plain_template
from dsv3_jax.data.config import DataConfig
from dsv3_jax.data.conversation import Continuation, Conversation, Sample
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.errors import UserError

SampleTokens = tuple[Int64[np.ndarray, " n"], Bool[np.ndarray, " n"]]
"""The ids of a sample, and for each whether the model learns to write it."""

# What can be wrong with a sample: the option that leaves such samples out, and what else mends them.
_PROBLEMS = {
    "unknown role": ("drop_unknown_roles", "use the roles system, user and assistant"),
    "empty turn": ("drop_empty_turns", "fill the turn"),
    "nothing to learn": ("drop_without_target", "add what the assistant answers"),
    "too long": ("drop_overlong", "give a larger sequence length"),
}


def with_chat_template(tokenizer: Tokenizer) -> Tokenizer:
    """Returns the tokenizer with its published chat template, or with the plain one where it has none."""
    published = tokenizer.settings.chat_template is not None
    return tokenizer if published else tokenizer.with_chat_template(plain_template(tokenizer))


class SampleEncoder:
    """Encodes samples.

    Args:
      tokenizer: a tokenizer with a chat template.
    """

    def __init__(self, tokenizer: Tokenizer, config: DataConfig) -> None:
        self._tokenizer, self._loss_on = tokenizer, config.loss_on
        self._template = ChatTemplate.of(tokenizer)

    def encode(self, sample: Sample) -> SampleTokens:
        """Returns the tokens of a sample.

        Raises:
          UserError: the chat template refuses the messages.
        """
        if isinstance(sample, Continuation):
            ids, learned = self._encode_continuation(sample)
        else:
            ids, learned = self._encode_conversation(sample)
        return np.array(ids, np.int64), np.array(learned, bool) | (self._loss_on == "all")

    def _encode_continuation(self, sample: Continuation) -> tuple[list[int], list[bool]]:
        tokenizer = self._tokenizer
        if sample.prompt is None:
            ids = [*tokenizer.encode(sample.completion), tokenizer.eos_id]
            return ids, [True] * len(ids)
        prompt = tokenizer.prompt_ids(sample.prompt)
        # Control tokens have their names in completions that a model wrote, such as <think>.
        written = tokenizer.encode(sample.completion, control_tokens=True) + [tokenizer.eos_id] * sample.ends
        return [*prompt, *written], [False] * len(prompt) + [True] * len(written)

    def _encode_conversation(self, sample: Conversation) -> tuple[list[int], list[bool]]:
        assert self._template is not None
        tokens = self._template.encode([dataclasses.asdict(message) for message in sample.messages])
        learned = np.array(tokens.from_assistant, bool)
        if self._loss_on == "last" or sample.given:
            begins = learned & ~np.concatenate([[False], learned[:-1]])
            turn = np.cumsum(begins)  # from 1, of the assistant's turns
            first = sum(message.role == "assistant" for message in sample.messages[: sample.given]) + 1
            learned &= turn >= (turn[-1] if self._loss_on == "last" else first)
        return tokens.ids, learned.tolist()


class SampleAccount:
    """Counts samples that are used and samples that cannot be used.

    Attributes:
      used: number of samples that are used.
      rejected: number of lines that say that no completion of a problem was kept.
    """

    def __init__(self, config: DataConfig) -> None:
        self._config = config
        self._found: dict[str, tuple[int, str]] = {}
        self.used = self.rejected = 0

    def problem_of(self, sample: Sample, where: str) -> bool:
        """Counts a sample whose roles or turns are wrong; returns whether it was."""
        return bool(sample.problem) and self._count(sample.problem, where)

    def problem_of_tokens(self, tokens: SampleTokens, where: str) -> bool:
        """Counts a sample that is too long or has nothing to learn; returns whether it was."""
        ids, learned = tokens
        if len(ids) > self._config.row_space:
            return self._count("too long", f"{where}, {len(ids):,} tokens")
        # The first token of a sample is predicted from nothing.
        return not learned[1:].any() and self._count("nothing to learn", where)

    def _count(self, problem: str, where: str) -> bool:
        count, first = self._found.get(problem, (0, where))
        self._found[problem] = count + 1, first
        return True

    def check(self) -> None:
        """Checks that all samples that cannot be used are to be left out.

        Raises:
          UserError: some are not; the message gives the number, the first place, and the option that drops them.
        """
        for problem, (option, remedy) in _PROBLEMS.items():
            if problem in self._found and not getattr(self._config, option):
                count, first = self._found[problem]
                limit = f" (more than {self._config.row_space:,} tokens)" if problem == "too long" else ""
                raise UserError(
                    f"{first}: {problem}{limit}; {count:,} of {self.total:,} samples are so: {remedy}, or leave them "
                    f"out with --{option.replace('_', '-')}"
                )

    @property
    def total(self) -> int:
        """Number of samples that were read."""
        return self.used + sum(count for count, _ in self._found.values())

    def describe(self) -> Iterator[str]:
        """Yields a line for what is used and for each reason why something is not."""
        yield f"read {self.total:,} samples, of which {self.used:,} are used"
        for problem, (count, first) in self._found.items():
            yield f"not used: {count:,} samples ({problem}), the first in {first}"
        if self.rejected:
            yield f"not used: {self.rejected:,} problems of which no completion was kept"
