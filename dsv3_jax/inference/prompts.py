"""Prompts of different lengths as one padded batch, checked against the model that will read them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import UserError

# Padded widths are multiples of this, so that prompts of similar lengths use the same compiled program.
_WIDTH_STEP = 32


@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """Token ids, padded on the right.

    Padding needs no mask: it comes after the prompt, where causal attention does not look, and decoding overwrites its
    cache entries before it reads them.

    Attributes:
      tokens: ids, int32.
      lengths: number of prompt tokens of each row, int32.
    """

    tokens: Int[np.ndarray, "B W"]
    lengths: Int[np.ndarray, " B"]

    @classmethod
    def pad(cls, prompts: Sequence[Sequence[int]]) -> PromptBatch:
        """Makes a batch of these prompts. Its width is rounded up.

        Raises:
          UserError: there are no prompts.
        """
        if not len(prompts):
            raise UserError("no prompt was given; give at least one")
        lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
        width = -(-max(int(lengths.max()), 1) // _WIDTH_STEP) * _WIDTH_STEP
        tokens = np.zeros((len(prompts), width), np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = prompt
        return cls(tokens, lengths)

    def check(self, config: ModelConfig, max_new_tokens: int) -> None:
        """Checks that the model can read every prompt and add `max_new_tokens` tokens to it.

        Raises:
          UserError: it cannot; the message names the prompt.
        """
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
        context = config.max_position_embeddings
        for row, length in enumerate(self.lengths):
            if length < 1:
                raise UserError(f"prompt {row} is empty; give at least one token")
            if length > context:
                raise UserError(
                    f"prompt {row} has {length} tokens but the model's context is {context}; shorten the prompt"
                )
            if length + max_new_tokens > context:
                raise UserError(
                    f"prompt {row}'s {length} tokens and {max_new_tokens} new ones exceed the model's "
                    f"context of {context}; ask for at most {context - length} new tokens"
                )
            ids = self.tokens[row, :length]
            for unknown in ids[(ids < 0) | (ids >= config.vocab_size)]:
                raise UserError(
                    f"prompt {row} holds token {unknown}, outside the model's vocabulary of {config.vocab_size}; "
                    "use the tokenizer the model was trained with"
                )
