"""Counting tokens exactly on the device.

A run counts past 2^31 tokens, where int32 ends, and past 2^24, where float32 stops counting by one; 64-bit integers
are off in JAX unless a global flag is set. So the count is two int32 digits in base 2^30.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_jax.errors import ConfigError

_BASE_BITS = 30

TokenCount = Int[Array, "2"]


def token_count(tokens: int) -> TokenCount:
    """`tokens` as two digits, the larger first."""
    return jnp.asarray([tokens >> _BASE_BITS, tokens & ((1 << _BASE_BITS) - 1)], jnp.int32)


def add_tokens(count: TokenCount, tokens: int) -> TokenCount:
    """`count` plus a step's tokens."""
    if not 0 <= tokens < 1 << _BASE_BITS:
        raise ConfigError(f"a step cannot have {tokens} tokens; make the batch smaller than 2^{_BASE_BITS}")
    low = count[1] + tokens
    carry = low >> _BASE_BITS
    return jnp.stack([count[0] + carry, low - (carry << _BASE_BITS)])


def tokens_as_int(count: TokenCount) -> int:
    """The exact number, on the host."""
    high, low = np.asarray(count).tolist()
    return (high << _BASE_BITS) + low


def tokens_as_float(count: TokenCount) -> Float[Array, ""]:
    """The number rounded to float32 (1 part in 2^24), for schedules inside jit."""
    return count[0].astype(jnp.float32) * float(1 << _BASE_BITS) + count[1].astype(jnp.float32)
