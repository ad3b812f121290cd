"""Absorbed decoding of MLA over a paged cache of latents (report section 2.1.1)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.device import Implementation, choose_implementation, kernel_module
from pallas_kernels.latent_decode.operands import Operands

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
    scales: Float[Array, "P page"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B T H c"]:
    """Returns the latents that each query attends to, softmax(scale * q kᵀ) v with keys [latent; rotary key].

    Args:
      q_latent: queries with the keys' up-projection absorbed.
      q_rope: rotated queries.
      latents, rope_keys: entries of all pages; the latents are also the values. Latents are in the dtype of the
        queries, or e4m3 with `scales`.
      table: int32, the page of each sequence's positions 0 .. page - 1, and so on. Sequences may share pages. Entries
        after a sequence's last position are not read, whatever they are.
      positions: int32, position of each query in its sequence. It sees entries `first` .. position; with -1 nothing,
        and its result is zero.
      scale: positive multiplier of the logits.
      first: position of the first entry that is seen, 0 or more.
      scales: float32, one for each entry, where the latents are e4m3: a latent is values times scale. The kernels
        multiply logits and weights by it in float32, so that latents are not rounded again.
      implementation: "reference", "hopper" or "tpu"; by default the best one for the device that can take the operands.
        On Hopper: bfloat16, c a multiple of 32 (of 64 in e4m3) up to 512, r of 16, pages of 8, 16, 32 or a multiple of
        64 entries.

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit, or an implementation that cannot run here.
    """
    x = Operands(q_latent, q_rope, latents, rope_keys, table, positions, scales)
    _check(x, scale, first)
    name = choose_implementation(implementation, _available(q_latent, q_rope, latents))
    return kernel_module("latent_decode", name).decode(x, float(scale), first)


def has_decode_kernel(
    q_latent: Float[Array, "B T H c"], q_rope: Float[Array, "B T H r"], latents: Float[Array, "P page c"]
) -> bool:
    """Returns whether `latent_decode` runs a kernel for such operands where the program being traced will run."""
    return choose_implementation(None, _available(q_latent, q_rope, latents)) != "reference"


def _available(q_latent, q_rope, latents) -> tuple[Implementation, ...]:
    page, width = latents.shape[1:]
    fits = page in (8, 16, 32) or page % 64 == 0
    fits = fits and width % (32 if latents.dtype == q_latent.dtype else 64) == 0 and width <= 512
    fits = fits and q_rope.shape[-1] % 16 == 0 and q_latent.dtype == jnp.bfloat16
    return ("reference", "hopper", "tpu") if fits else ("reference", "tpu")


def _check(x: Operands, scale: float, first: int) -> None:
    dtype, queries = x.q_latent.dtype, x.q_latent.shape
    if len(queries) != 4:
        raise ValueError(f"q_latent must be [batch, tokens, heads, width], not {queries}")
    if x.latents.ndim != 3 or x.latents.shape[2] != queries[3]:
        raise ValueError(f"latents must be [pages, page, {queries[3]}], not {x.latents.shape}")
    rope = x.rope_keys.shape[-1]
    wanted = {
        "q_rope": (*queries[:3], rope),
        "rope_keys": (*x.latents.shape[:2], rope),
        "table": (queries[0], x.table.shape[-1]),
        "positions": queries[:2],
        "scales": x.latents.shape[:2],
    }
    for name, shape in wanted.items():
        array = getattr(x, name)
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, not {array.shape}")
    stored = dtype if x.scales is None else jnp.dtype(jnp.float8_e4m3fn)
    of_latents = f"{dtype} as q_latent is" if x.scales is None else f"{stored}, with scales"
    for name, is_right, right in (
        ("q_rope", x.q_rope.dtype == dtype, f"{dtype} as q_latent is"),
        ("latents", x.latents.dtype == stored, of_latents),
        ("rope_keys", x.rope_keys.dtype == dtype, f"{dtype} as q_latent is"),
        ("scales", x.scales is None or x.scales.dtype == jnp.float32, "float32"),
    ):
        if not is_right:
            raise TypeError(f"{name} must be {right}, not {getattr(x, name).dtype}")
    if scale <= 0:
        raise ValueError(f"scale must be positive, not {scale}")
    if first < 0:
        raise ValueError(f"first must be 0 or more, not {first}")
