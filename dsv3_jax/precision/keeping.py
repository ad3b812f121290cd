"""The name by which the report's rematerialisation policy knows what it keeps (section 3.2.3)."""

from __future__ import annotations

import jax
from jax.ad_checkpoint import checkpoint_name

KEPT = "kept"


def keep(x: jax.Array) -> jax.Array:
    """`x` unchanged, kept for the backward pass by the report's policy."""
    return checkpoint_name(x, KEPT)
