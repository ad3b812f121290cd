"""Prompts of any lengths as one padded batch, checked against the model that will read them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import UserError

# Padded widths are multiples of this, so that prompts of similar lengths share one compiled program.
_WIDTH_STEP = 32


@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """Token ids padded on the right.

    Padding needs no mask: it lies behind the prompt, where causal attention does not look, and decoding
    overwrites its cache entries before it reads them.
    """

    tokens: Int[np.ndarray, "B W"]
    lengths: Int[np.ndarray, " B"]

    @classmethod
    def pad(cls, prompts: Sequence[Sequence[int]]) -> PromptBatch:
        """The batch of these prompts; its width is rounded up."""
        if not len(prompts):
            raise UserError("there is no prompt to continue; give at least one")
        lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
        width = -(-max(int(lengths.max()), 1) // _WIDTH_STEP) * _WIDTH_STEP
        tokens = np.zeros((len(prompts), width), np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = prompt
        return cls(tokens, lengths)

    def check(self, config: ModelConfig, max_new_tokens: int) -> None:
        """Raises a UserError unless the model can read every prompt and write `max_new_tokens` behind it."""
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
