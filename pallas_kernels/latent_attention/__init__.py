"""Training attention of MLA (report Eq. 10): softmax(scale * q kᵀ) v with keys wider than values."""

from __future__ import annotations

import functools
from typing import Any, Literal, Protocol, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.device import Implementation, choose_implementation, kernel_module, target_platform
from pallas_kernels.latent_attention import cudnn
from pallas_kernels.latent_attention.operands import OfResult, Operands

__all__ = ["Keep", "has_attention_kernel", "latent_attention", "latent_attention_and_kept"]

WIDTH_MULTIPLE = 16  # of every width that a Hopper kernel takes


@jax.named_scope("latent_attention")
def latent_attention(
    q: Float[Array, "B T H qk"],
    k: Float[Array, "B T H c"],
    v: Float[Array, "B T H v"],
    *,
    scale: float,
    k_shared: Float[Array, "B T r"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    causal: bool = True,
    implementation: Implementation | Literal["cudnn"] | None = None,
) -> Float[Array, "B T H v"]:
    """Returns the attended values. Differentiable; no matrix of logits is kept, except by the reference.

    Logits, exponentials and sums are float32; exponentials and gradients of logits are rounded to the inputs' dtype for
    their products.

    Args:
      q: queries; the first c columns multiply `k`, the other r columns `k_shared`.
      k: keys of each head.
      v: values of each head; their width need not be that of the keys.
      scale: positive multiplier of the logits.
      k_shared: keys that all heads share, MLA's rotary part. They are never repeated for the heads in memory, and their
        gradient is the sum over the heads.
      segment_ids: when given, positions attend only within equal ids.
      causal: whether a position sees only itself and the positions before it.
      implementation: "reference", "hopper" or "tpu"; by default the best one for the device that can take the operands.
        Hopper's kernels take bfloat16 and widths that are multiples of 16. "cudnn" calls cuDNN on a GPU, which takes no
        segment ids and repeats the shared keys in memory.

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit, or an implementation that cannot run here.
    """
    x = Operands(q, k, v, k_shared, segment_ids)
    _check(x, scale)
    if implementation == "cudnn":
        return _cudnn(x, scale, causal)
    name = choose_implementation(implementation, _available(q, k, v))
    if name == "reference":
        return kernel_module("latent_attention", name).attention(x, scale, causal)[0]
    out, _ = cast("tuple[Array, Any]", _kernel(x, name, float(scale), causal, None))
    return out


class Keep(Protocol):
    """How the result of attention is kept for the backward pass; hashable, as programs are compiled for each."""

    def keep(
        self, out: Float[Array, "B T H v"], log_sums: Float[Array, "B H T"]
    ) -> tuple[Float[Array, "B T H v"], Any, Float[Array, "B H T"]]:
        """Returns the result, what is kept in its place (None: itself), and the logarithms of sums, which are kept."""
        ...

    def restore(self, kept: Any, like: Float[Array, "B T H v"]) -> Float[Array, "B T H v"]:
        """Returns the result, with the shape and dtype of `like`, from what was kept."""
        ...


@jax.named_scope("latent_attention")
def latent_attention_and_kept(
    q: Float[Array, "B T H qk"],
    k: Float[Array, "B T H c"],
    v: Float[Array, "B T H v"],
    *,
    scale: float,
    keep: Keep,
    k_shared: Float[Array, "B T r"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T H v"], Any]:
    """Returns causally attended values, and what is kept of them, which the next operation may keep too.

    The backward pass reads what was kept, and the logarithms of the rows' sums, so that it need not attend again. What
    is kept has no gradient (report, section 3.3.3).

    Args:
      keep: says what is kept.
      q, k, v, scale, k_shared, segment_ids: as in `latent_attention`.

    Raises:
      ValueError, TypeError: as `latent_attention`; or there is no kernel for the operands (`has_attention_kernel`).
    """
    x = Operands(q, k, v, k_shared, segment_ids)
    _check(x, scale)
    if not has_attention_kernel(q, k, v):
        raise ValueError(f"no attention kernel takes these operands on {target_platform()}; call latent_attention")
    return _kernel(x, choose_implementation(None, _available(q, k, v)), float(scale), True, keep)


def has_attention_kernel(q: Float[Array, "B T H qk"], k: Float[Array, "B T H c"], v: Float[Array, "B T H v"]) -> bool:
    """Returns whether `latent_attention` runs a kernel for such operands where the program being traced will run."""
    return choose_implementation(None, _available(q, k, v)) != "reference"


def _cudnn(x: Operands, scale: float, causal: bool) -> Float[Array, "B T H v"]:
    if target_platform() not in ("hopper", "gpu"):
        raise ValueError(f"implementation 'cudnn' cannot run here: this program is for {target_platform()}")
    if x.segment_ids is not None:
        raise ValueError("implementation 'cudnn' takes no segment_ids")
    return cudnn.attention(x, scale, causal)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _kernel(x, name, scale, causal, keep):
    return _forward(x, name, scale, causal, keep)[0]


def _forward(x, name, scale, causal, keep):
    out, log_sums = kernel_module("latent_attention/forward", name).forward(x, scale, causal)
    out, kept, log_sums = (out, None, log_sums) if keep is None else keep.keep(out, log_sums)
    return (out, kept), (x, out if kept is None else kept, log_sums)


def _backward(name, scale, causal, keep, residuals, gradients):
    (x, out, log_sums), (gradient, _) = residuals, gradients
    if not isinstance(out, jax.Array):
        out = keep.restore(out, gradient)
    # A row's sum of weight times gradient of the weight, which the softmax's derivative subtracts.
    mean = jnp.einsum("bthv,bthv->bht", out, gradient, preferred_element_type=jnp.float32)
    result = OfResult(gradient, log_sums, mean)
    gradients = kernel_module("latent_attention/backward", name).backward(x, result, scale, causal)
    return (Operands(*gradients, segment_ids=None),)


_kernel.defvjp(_forward, _backward)


def _available(q, k, v) -> tuple[Implementation, ...]:
    widths = (k.shape[-1], v.shape[-1], q.shape[-1] - k.shape[-1])
    fits = q.dtype == jnp.bfloat16 and all(width % WIDTH_MULTIPLE == 0 for width in widths)
    return ("reference", "hopper", "tpu") if fits else ("reference", "tpu")


def _check(x: Operands, scale: float) -> None:
    q, k, v, k_shared, segment_ids = x
    if q.ndim != 4:
        raise ValueError(f"q must be [batch, positions, heads, width], not {q.shape}")
    for name, array, ndim in (("k", k, 4), ("v", v, 4), ("k_shared", k_shared, 3)):
        if array is not None and (array.ndim != ndim or array.shape[:-1] != q.shape[: ndim - 1]):
            wanted = ", ".join(map(str, q.shape[: ndim - 1]))
            raise ValueError(f"{name} must be [{wanted}, width] as q is {q.shape}, not {array.shape}")
    shared = 0 if k_shared is None else k_shared.shape[2]
    if k.shape[3] + shared != q.shape[3]:
        raise ValueError(f"keys are {k.shape[3]} + {shared} wide and q {q.shape[3]}; both must be equal")
    if segment_ids is not None and segment_ids.shape != q.shape[:2]:
        raise ValueError(f"segment_ids must have shape {q.shape[:2]}, not {segment_ids.shape}")
    for name, array in (("k", k), ("v", v), ("k_shared", k_shared)):
        if array is not None and array.dtype != q.dtype:
            raise TypeError(f"{name} must be {q.dtype} as q is, not {array.dtype}")
    if scale <= 0:
        raise ValueError(f"scale must be positive, not {scale}")
