"""Absorbed decoding of MLA over a paged cache of latents (report section 2.1.1)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.device import Implementation, choose_implementation, kernel_module

__all__ = ["has_decode_kernel", "latent_decode"]


@jax.named_scope("latent_decode")
def latent_decode(
    q_latent: Float[Array, "B T H c"],
    q_rope: Float[Array, "B T H r"],
    latents: Float[Array, "P page c"],
    rope_keys: Float[Array, "P page r"],
    table: Int[Array, "B N"],
    positions: Int[Array, "B T"],
    *,
    scale: float,
    first: int = 0,
    implementation: Implementation | None = None,
) -> Float[Array, "B T H c"]:
    """Returns the latents that each query attends to, softmax(scale * q kᵀ) v with keys [latent; rotary key].

    Args:
      q_latent: queries with the keys' up-projection absorbed.
      q_rope: rotated queries.
      latents, rope_keys: entries of all pages; the latents are also the values.
      table: int32, the page of each sequence's positions 0 .. page - 1, and so on. Sequences may share pages. Entries
        after a sequence's last position are not read, whatever they are.
      positions: int32, position of each query in its sequence. It sees entries `first` .. position; with -1 nothing,
        and its result is zero.
      scale: positive multiplier of the logits.
      first: position of the first entry that is seen, 0 or more.
      implementation: "reference", "hopper" or "tpu"; by default the best one for the device that can take the operands.
        On Hopper: bfloat16, c a multiple of 32 up to 512, r of 16, pages of 8, 16, 32 or a multiple of 64 entries.

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit, or an implementation that cannot run here.
    """
    _check(q_latent, q_rope, latents, rope_keys, table, positions, scale, first)
    name = choose_implementation(implementation, _available(q_latent, q_rope, latents, rope_keys))
    return kernel_module("latent_decode", name).decode(
        q_latent, q_rope, latents, rope_keys, table, positions, float(scale), first
    )


def has_decode_kernel(
    q_latent: Float[Array, "B T H c"],
    q_rope: Float[Array, "B T H r"],
    latents: Float[Array, "P page c"],
    rope_keys: Float[Array, "P page r"],
) -> bool:
    """Returns whether `latent_decode` runs a kernel for such operands where the program being traced will run.

    There is none where the entries have another dtype than the queries, as those of a cache in FP8 have.
    """
    same = all(x.dtype == q_latent.dtype for x in (q_rope, latents, rope_keys))
    return same and choose_implementation(None, _available(q_latent, q_rope, latents, rope_keys)) != "reference"


def _available(q_latent, q_rope, latents, rope_keys) -> tuple[Implementation, ...]:
    page, width, rope = latents.shape[1], latents.shape[2], rope_keys.shape[2]
    fits = page in (8, 16, 32) or page % 64 == 0
    fits = fits and width % 32 == 0 and width <= 512 and rope % 16 == 0
    fits = fits and all(x.dtype == jnp.bfloat16 for x in (q_latent, q_rope, latents, rope_keys))
    return ("reference", "hopper", "tpu") if fits else ("reference", "tpu")


def _check(q_latent, q_rope, latents, rope_keys, table, positions, scale, first) -> None:
    if q_latent.ndim != 4:
        raise ValueError(f"q_latent must be [batch, tokens, heads, width], not {q_latent.shape}")
    if latents.ndim != 3 or latents.shape[2] != q_latent.shape[3]:
        raise ValueError(f"latents must be [pages, page, {q_latent.shape[3]}], not {latents.shape}")
    wanted = {
        "q_rope": (q_rope, (*q_latent.shape[:3], rope_keys.shape[-1])),
        "rope_keys": (rope_keys, (*latents.shape[:2], rope_keys.shape[-1])),
        "table": (table, (q_latent.shape[0], table.shape[-1])),
        "positions": (positions, q_latent.shape[:2]),
    }
    for name, (x, shape) in wanted.items():
        if x.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, not {x.shape}")
    for name, x in (("q_rope", q_rope), ("latents", latents), ("rope_keys", rope_keys)):
        if x.dtype != q_latent.dtype:
            raise TypeError(f"{name} must be {q_latent.dtype} as q_latent is, not {x.dtype}")
    if scale <= 0:
        raise ValueError(f"scale must be positive, not {scale}")
    if first < 0:
        raise ValueError(f"first must be 0 or more, not {first}")
