"""Log-probabilities of tokens by the model's own distribution, computed only where a request asks for them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.inference.requests import TokenLogprobs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
    """Natural log-probabilities of one token at each of some positions, and of the most likely tokens there."""

    logprobs: Float[Array, "*positions"]
    top_tokens: Int[Array, "*positions top"]
    top_logprobs: Float[Array, "*positions top"]

    @classmethod
    def zeros(cls, positions: tuple[int, ...], top: int) -> Scores:
        """Returns zeros for positions of this shape."""
        shape = (*positions, top)
        return cls(jnp.zeros(positions, jnp.float32), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))

    @classmethod
    def of(
        cls, logits: Float[Array, "B T V"], tokens: Int[Array, "B T"], top: int, wanted: Bool[Array, " B"]
    ) -> Scores:
        """Returns the scores of `tokens` with the `top` most likely ones; zeros if no row is `wanted`."""

        def scores(_: None) -> Scores:
            logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
            own = jnp.take_along_axis(logprobs, tokens[..., None], axis=-1)[..., 0]
            best, likeliest = lax.top_k(logprobs, top)
            return cls(own, likeliest.astype(jnp.int32), best)

        return lax.cond(jnp.any(wanted), scores, lambda _: cls.zeros(tokens.shape, top), None)

    def at(self, index: tuple[int, ...], top: int) -> TokenLogprobs:
        """Returns the scores at one position, with the `top` most likely tokens."""
        tokens, values = self.top_tokens[index][:top].tolist(), self.top_logprobs[index][:top].tolist()
        return TokenLogprobs(float(self.logprobs[index]), tuple(zip(tokens, values, strict=True)))
