"""SwiGLU, the activation of every feed-forward network (report section 2.1.2)."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float


def swiglu(gate_up: Float[Array, "*batch 2 width"]) -> Float[Array, "*batch width"]:
    """Returns silu(gate) * up."""
    return jax.nn.silu(gate_up[..., 0, :]) * gate_up[..., 1, :]
