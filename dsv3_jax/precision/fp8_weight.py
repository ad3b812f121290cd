"""Weights kept as they were published in FP8: one byte per number, one float32 scale per block (report section 3.3.2).

A model loaded with `load_hf(folder, keep_fp8=True)` holds them in a quarter of float32's memory and computes under
every recipe: float32 and bfloat16 dequantize what they multiply by, an FP8 recipe multiplies by the stored values and
scales themselves. Such a weight is a constant: no gradient reaches it, and training leaves it as it is.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

import pallas_kernels as pk


def add_gradients(total: Any, more: Any) -> Any:
    """Returns the sum of two trees of gradients; of an `Fp8Weight` only the field `gradient` is one."""

    def add(one: Any, other: Any) -> Any:
        if not isinstance(one, Fp8Weight):
            return one + other
        if one.gradient is None or other.gradient is None:
            return one
        return dataclasses.replace(one, gradient=one.gradient + other.gradient)

    return jax.tree.map(add, total, more, is_leaf=lambda leaf: isinstance(leaf, Fp8Weight))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fp8Weight:
    """One parameter, made of one or more published FP8 matrices [out, in], that modules read as they read an array.

    Published matrices are stacked on leading axes: layers, experts, the pair of gate and up. The axes of `out` and of
    `in` may each be several, such as [heads, head width].

    Attributes:
      values: e4m3 [*stack, *out, *in]: the shape of the parameter.
      scales: float32 [*stack, ceil(out / 128), ceil(in / 128)]; weight = value * scale.
      columns: the size of `in`, all its axes multiplied.
      gradient: None for a constant. Else an array of the shape of `values` and of a wider dtype that gets the weight's
        gradient; its values are never read.
      view: the shape that `reshape` asked for; None for that of `values`.
      turned: the transposed matrices, where they were laid out ahead (`laid_out`).
    """

    values: Float[Array, "..."]
    scales: Float[Array, "... out_blocks in_blocks"]
    columns: int = dataclasses.field(metadata={"static": True})
    view: tuple[int, ...] | None = dataclasses.field(default=None, metadata={"static": True})
    gradient: Float[Array, "..."] | None = None
    turned: pk.Quantized | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that the weight replaces."""
        return self.values.shape if self.view is None else self.view

    @property
    def dtype(self) -> jnp.dtype:
        """float8_e4m3fn."""
        return self.values.dtype

    @property
    def ndim(self) -> int:
        """The number of axes of `shape`."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of weights."""
        return self.values.size

    def __getitem__(self, key: Int[Array, "..."] | int | Ellipsis) -> Fp8Weight:  # pyright: ignore[reportInvalidTypeForm]
        """Returns the whole weight for `...`, or the matrices that an index, or an array of indices, selects.

        The index is into the first axis of `shape`, which must hold whole matrices: a stacked axis, or several that
        `reshape` has merged. Values and scales are gathered as they are stored.
        """
        if key is Ellipsis:
            return self
        count, stack = self.shape[0], self._stack
        merged = next((axes for axes in range(1, len(stack) + 1) if math.prod(stack[:axes]) == count), None)
        if merged is None or isinstance(key, tuple | slice):
            raise TypeError(f"an FP8 weight {self.shape} of {stack} matrices is read whole or by indices of matrices")
        values, scales = (x.reshape(count, *x.shape[merged:])[key] for x in (self.values, self.scales))
        view = None if self.view is None else (*jnp.shape(key), *self.view[1:])
        return dataclasses.replace(self, values=values, scales=scales, view=view)

    def reshape(self, *shape: int) -> Fp8Weight:
        """Returns the same weights under another shape, one axis of which may be -1; no data is moved."""
        known = -math.prod(shape) if -1 in shape else 1
        view = tuple(self.size // max(known, 1) if n == -1 else n for n in shape)
        return self if view == self.shape else dataclasses.replace(self, view=view, turned=None)

    def astype(self, dtype: jax.typing.DTypeLike) -> Float[Array, "..."]:
        """Returns values times scales as an array of `shape`, multiplied in float32 and rounded to `dtype`."""
        matrices = pk.Quantized(self.values.reshape(*self._stack, -1, self.columns), self.scales, "128x128")
        return lax.stop_gradient(pk.dequantize(matrices, dtype)).reshape(self.shape)

    def tiles(self) -> pk.Quantized:
        """Returns the matrices [*leading, out, in] of `shape` for an FP8 product, with values and scales as stored.

        Where `out` is several published matrices, one below the other (gate and up), each is padded with rows of zeros
        to whole blocks of 128. `pad` and `unpad` do the same to the outputs of a product.
        """
        leading, (parts, rows) = self.shape[:-2], self._parts
        values = self.values.reshape(*leading, parts, rows, self.columns)
        padded = jnp.pad(values, [(0, 0)] * (values.ndim - 2) + [(0, self._padding), (0, 0)])
        scales = self.scales.reshape(*leading, parts * self.scales.shape[-2], self.scales.shape[-1])
        return pk.Quantized(padded.reshape(*leading, -1, self.columns), scales, "128x128")

    def laid_out(self) -> Fp8Weight:
        """Returns the weight with its matrices in both orders in memory, which products of a loop then need not make.

        Its shape is [*leading, out, in], and is not to be changed.
        """
        return dataclasses.replace(self, turned=self.tiles().mT)

    def tiles_by_input(self) -> pk.Quantized:
        """Returns the transposed matrices [*leading, in, out] for an FP8 product."""
        return self.tiles().mT if self.turned is None else self.turned

    def pad(self, y: Float[Array, "M out"]) -> Float[Array, "M padded"]:
        """Returns outputs with zeros in the columns of the rows that `tiles` adds."""
        if not self._padding:
            return y
        parts = y.reshape(y.shape[0], *self._parts)
        return jnp.pad(parts, ((0, 0), (0, 0), (0, self._padding))).reshape(y.shape[0], -1)

    def unpad(self, y: Float[Array, "M padded"]) -> Float[Array, "M out"]:
        """Returns outputs without the columns of the rows that `tiles` adds."""
        if not self._padding:
            return y
        parts, rows = self._parts
        return y.reshape(y.shape[0], parts, -1)[:, :, :rows].reshape(y.shape[0], -1)

    @property
    def _stack(self) -> tuple[int, ...]:
        return self.scales.shape[:-2]

    @property
    def _parts(self) -> tuple[int, int]:
        """How many published matrices make one matrix of `shape`, and the rows of each."""
        matrices = math.prod(self._stack)
        return matrices // math.prod(self.shape[:-2]), self.size // (matrices * self.columns)

    @property
    def _padding(self) -> int:
        parts, rows = self._parts
        return -rows % pk.TILE if parts > 1 else 0
