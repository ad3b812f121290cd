"""Scores of completions by a reward model, which `dsv3 reward-model` trains."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_jax.data import Tokenizer
from dsv3_jax.errors import UserError
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.training.preferences import scores
from dsv3_jax.training.state import split_model

_ROWS = 8  # of a forward pass
_SMALLEST_LENGTH = 16  # tokens of the smallest padded row


class RewardModel:
    """A reward that a trained model gives; any number, of which only differences have a meaning.

    Args:
      model: the model, on one device.
      tokenizer: that of its weights.
    """

    def __init__(self, model: DeepSeekV3, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._context = tokenizer, model.config.max_position_embeddings
        skeleton, params, biases = split_model(model)
        self._arrays = params, biases

        @jax.jit
        def last_scores(arrays: tuple, tokens: Int[Array, "B T"], lengths: Int[Array, " B"]) -> Float[Array, " B"]:
            model = skeleton.model(*arrays)
            inside = jnp.arange(tokens.shape[1]) < lengths[:, None]
            hidden = model.features(tokens, segment_ids=inside.astype(jnp.int32)).hidden
            return scores(model, jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0])

        self._scores = last_scores

    def __call__(self, items: Sequence[tuple[str, str, str]]) -> list[float]:
        """Returns the score of each (prompt, completion, answer); the answer is not read.

        Raises:
          UserError: a prompt with its completion is longer than the model's context.
        """
        texts = [self._encode(prompt, completion) for prompt, completion, _ in items]
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        found = [0.0] * len(texts)
        for start in range(0, len(order), _ROWS):
            some = order[start : start + _ROWS]
            length = 2 ** math.ceil(math.log2(max(_SMALLEST_LENGTH, len(texts[some[-1]]))))
            tokens, lengths = np.zeros((_ROWS, length), np.int32), np.ones(_ROWS, np.int32)
            for row, index in enumerate(some):
                tokens[row, : len(texts[index])] = texts[index]
                lengths[row] = len(texts[index])
            values = np.asarray(self._scores(self._arrays, tokens, lengths))
            for row, index in enumerate(some):
                found[index] = float(values[row])
        return found

    def _encode(self, prompt: str, completion: str) -> list[int]:
        """Returns the tokens as preference pairs have them."""
        tokenizer = self._tokenizer
        written = tokenizer.encode(completion, control_tokens=True)
        ids = [*tokenizer.prompt_ids(prompt), *written, tokenizer.eos_id]
        if len(ids) > self._context:
            raise UserError(
                f"a prompt with its completion has {len(ids)} tokens, more than the reward model's context of "
                f"{self._context}: give a smaller --max-new-tokens"
            )
        return ids
