"""Sampling of the next token from logits: greedy, or drawn with temperature, top-k and top-p."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from dsv3_jax.errors import UserError

_COLDEST = 1e-30  # logits divided by less would be infinite


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """The rule by which the next token is chosen. It is immutable, so that it can be a static argument in `jit`.

    The logits are divided by the temperature; the `top_k` largest are kept; of these, renormalised, the smallest set of
    most likely tokens whose probability reaches `top_p` is kept. The most likely token is always kept.

    Attributes:
      temperature: divides the logits; 0, and anything below 1e-30, always takes the most likely token.
      top_k: number of tokens to keep; None keeps all.
      top_p: probability to keep, above 0 and at most 1; None keeps all.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature must be 0 (greedy) or positive and finite, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k must be at least 1, not {self.top_k}; leave it out to keep every token")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, not {self.top_p}")

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always chosen, without randomness."""
        return self.temperature < _COLDEST

    def __call__(self, logits: Float[Array, "B V"], keys: Key[Array, " B"] | None) -> Int[Array, " B"]:
        """Returns one token per row, int32.

        Args:
          logits: of the next token.
          keys: one random key per row; a greedy sampler needs none.
        """
        if self.is_greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        if keys is None:
            raise UserError("sampling at a temperature above 0 needs a random key")
        kept, tokens = self.filter(logits)
        drawn = jax.vmap(jax.random.categorical)(keys, kept)
        return jnp.take_along_axis(tokens, drawn[:, None], axis=-1)[:, 0].astype(jnp.int32)

    def filter(self, logits: Float[Array, "B V"]) -> tuple[Float[Array, "B C"], Int[Array, "B C"]]:
        """Returns the candidates for the next token: their logits divided by the temperature, and their ids.

        The logit is -inf where `top_p` removed the token. C is V, or `top_k` if that is smaller. With a filter the
        candidates are sorted, most likely first.
        """
        scaled = logits.astype(jnp.float32) / self.temperature
        vocabulary = scaled.shape[-1]
        if self.top_k is None and self.top_p is None:
            return scaled, jnp.broadcast_to(jnp.arange(vocabulary), scaled.shape)
        kept, tokens = jax.lax.top_k(scaled, min(self.top_k or vocabulary, vocabulary))
        if self.top_p is not None:
            probabilities = jax.nn.softmax(kept, axis=-1)
            before = jnp.cumsum(probabilities, axis=-1) - probabilities
            kept = jnp.where(before < self.top_p, kept, -jnp.inf)
        return kept, tokens


GREEDY = Sampler(temperature=0.0)
