"""Marks the arrays that the report's recomputation policy keeps for the backward pass (section 3.2.3)."""

from __future__ import annotations

import jax
from jax.ad_checkpoint import checkpoint_name

KEPT = "kept"


def keep(x: jax.Array) -> jax.Array:
    """Returns `x`, marked so that the report's recomputation policy keeps it for the backward pass."""
    return checkpoint_name(x, KEPT)
