"""The rule by which drafts are accepted, so that the text has the distribution of plain sampling (report 5.4.3).

A draft x that was drawn from q is accepted with probability min(1, p(x) / q(x)), p being the distribution of plain
sampling. The first draft that is not is replaced by a token drawn from max(p - q, 0), normalised. A token chosen this
way has distribution p (Leviathan et al., 2023). Greedy rows accept the draft that is the most likely token.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.inference.sampling import SamplerRows, choose, draw_keys, likeliest

# What a request's random numbers at a position are for.
TOKEN, ACCEPTANCE, DRAFT = 0, 1, 2


def check_draft(
    draft: Int[Array, " B"],
    adjusted: Float[Array, "B V"],
    draft_adjusted: Float[Array, "B V"],
    rows: SamplerRows,
    positions: Int[Array, " B"],
) -> tuple[Bool[Array, " B"], Int[Array, " B"]]:
    """Returns whether each row's draft is accepted, and the token to write: the draft, or what replaces it.

    Args:
      draft: drawn from the softmax of `draft_adjusted`, or its most likely token in greedy rows.
      adjusted, draft_adjusted: logits of p and q, from `adjust`.
      positions: of the token, for the random numbers.
    """
    best = likeliest(adjusted)
    drawn_rows = rows.temperature > 0

    def by_rejection(_: None) -> tuple[Bool[Array, " B"], Int[Array, " B"]]:
        p, q = jax.nn.softmax(adjusted, axis=-1), jax.nn.softmax(draft_adjusted, axis=-1)
        of_draft = draft[:, None]
        p_draft, q_draft = (jnp.take_along_axis(x, of_draft, axis=1)[:, 0] for x in (p, q))
        uniform = jax.vmap(jax.random.uniform)(draw_keys(rows, positions, ACCEPTANCE))
        accepted = uniform * q_draft < p_draft
        rest = jnp.maximum(p - q, 0)
        # Rounding may leave nothing of p beyond q: then the two are equal, and p itself is right.
        rest = jnp.where(jnp.any(rest > 0, axis=-1, keepdims=True), rest, p)
        other = choose(jnp.log(rest), rows, positions, TOKEN)
        accepted = jnp.where(drawn_rows, accepted, best == draft)
        return accepted, jnp.where(accepted, draft, jnp.where(drawn_rows, other, best))

    return lax.cond(jnp.any(drawn_rows), by_rejection, lambda _: (best == draft, best), None)
