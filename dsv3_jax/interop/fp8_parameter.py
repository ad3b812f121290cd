"""A weight kept as it was published in FP8: one byte a number, and one scale a block of 128 x 128.

It stands in for an array where modules ask for `[...]`, `reshape` and `astype`: `astype` dequantises, so a model loaded
with `load_hf(folder, keep_fp8=True)` computes in any recipe from a quarter of float32's memory. A recipe that
multiplies in FP8 takes `quantized()` and never leaves the stored values.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv3_jax.interop.tensor_names import BLOCK
from pallas_kernels import Quantized


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fp8Weight:
    """A stack of matrices in e4m3 blocks.

    Attributes:
      values: e4m3, in the parameter's shape: leading axes, then the axes of out, then those of in.
      scales: float32 [*leading, ceil(out / 128), ceil(in / 128)]; weight = value * scale.
      columns: in, the width of a matrix.
      view: the shape asked for by `reshape`; None for the parameter's own.
    """

    values: Float[Array, "..."]
    scales: Float[Array, "... out_blocks in_blocks"]
    columns: int = dataclasses.field(metadata={"static": True})
    view: tuple[int, ...] | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """What an array in its place would have."""
        return self.values.shape if self.view is None else self.view

    @property
    def dtype(self) -> jnp.dtype:
        """e4m3."""
        return self.values.dtype

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.values.size

    def __getitem__(self, key: object) -> Fp8Weight:
        """`[...]` only: how modules read a parameter."""
        if key is not Ellipsis:
            raise TypeError("an FP8 weight is read whole: weight[...]")
        return self

    def reshape(self, *shape: int) -> Fp8Weight:
        """The same numbers in another shape; takes effect in `astype`."""
        known = -math.prod(shape) if -1 in shape else 1
        return dataclasses.replace(self, view=tuple(self.size // max(known, 1) if n == -1 else n for n in shape))

    def astype(self, dtype: jax.typing.DTypeLike) -> Float[Array, "..."]:
        """Plain numbers: values times scales in float32, rounded to `dtype`."""
        quantized = self.quantized()
        rows, columns = quantized.values.shape[-2:]
        wide = jnp.repeat(quantized.scales, BLOCK, axis=-2)[..., :rows, :]
        wide = jnp.repeat(wide, BLOCK, axis=-1)[..., :columns]
        return (quantized.values.astype(jnp.float32) * wide).astype(dtype).reshape(self.shape)

    def quantized(self) -> Quantized:
        """The matrices, [*leading, out, in], as the FP8 kernels take them."""
        leading = self.scales.shape[:-2]
        return Quantized(self.values.reshape(*leading, -1, self.columns), self.scales, "128x128")
