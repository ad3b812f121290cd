"""Weights in eight-bit whole numbers with one float32 scale per output channel, for generation on a CPU.

A product with such a weight quantizes each row of its input too, to eight bits with one scale per row. The sums are of
whole numbers and therefore exact: a row's result is the same bits in every batch. Weights take a quarter of float32's
memory, and a processor with eight-bit dot products reads and multiplies them several times as fast. Such a weight is a
constant: no gradient reaches it.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

_LARGEST = 127


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Weight:
    """One parameter, which modules read as they read an array.

    Attributes:
      values: int8 [*stack, *out, *in].
      scales: float32 [*stack, *out]; weight = value * scale.
    """

    values: Int[Array, "..."]
    scales: Float[Array, "..."]

    @classmethod
    def of(cls, weight: Float[Array, "..."], in_axes: int = 1) -> Int8Weight:
        """Returns the nearest weight with `in_axes` input axes: each channel's largest magnitude becomes 127."""
        flat, scales = _rounded(weight.reshape(*weight.shape[: weight.ndim - in_axes], -1))
        return cls(flat.reshape(weight.shape), scales)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that the weight replaces."""
        return self.values.shape

    @property
    def dtype(self) -> jnp.dtype:
        """int8."""
        return self.values.dtype

    @property
    def ndim(self) -> int:
        """The number of axes of `shape`."""
        return self.values.ndim

    def __getitem__(self, key: Int[Array, "..."] | int | Ellipsis) -> Int8Weight:  # pyright: ignore[reportInvalidTypeForm]
        """Returns the whole weight for `...`, or the matrices that an index, or an array of indices, selects."""
        return self if key is Ellipsis else Int8Weight(self.values[key], self.scales[key])

    def reshape(self, *shape: int) -> Int8Weight:
        """Returns the same weights under another shape, whose last axis is all inputs together; one may be -1."""
        values = self.values.reshape(*shape)
        assert values.shape[-1] == math.prod(self.values.shape[self.scales.ndim :])
        return Int8Weight(values, self.scales.reshape(values.shape[:-1]))

    def astype(self, dtype: jax.typing.DTypeLike) -> Float[Array, "..."]:
        """Returns values times scales as an array of `shape`, rounded to `dtype`."""
        in_axes = self.values.ndim - self.scales.ndim
        scales = self.scales.reshape(*self.scales.shape, *[1] * in_axes)
        return lax.stop_gradient(self.values.astype(jnp.float32) * scales).astype(dtype)

    def product(self, x: Float[Array, "*batch in"], dtype: jax.typing.DTypeLike) -> Float[Array, "*batch out"]:
        """Returns y = W x for one matrix [out, in], with the rows of x rounded to eight bits.

        For a stack of matrices x is [*stack, rows, in].
        """
        stack = self.values.shape[:-2]
        rows = x.reshape(*stack, -1, x.shape[-1])
        count = rows.shape[-2]
        if count == 1:  # XLA's kernel for a single row is slow
            rows = jnp.repeat(rows, 2, axis=-2)
        values, row_scales = _rounded(rows)
        axes = tuple(range(len(stack)))
        contract_last = (((rows.ndim - 1,), (self.values.ndim - 1,)), (axes, axes))
        sums = lax.dot_general(values, self.values, contract_last, preferred_element_type=jnp.int32)
        y = sums.astype(jnp.float32) * row_scales[..., None] * self.scales[..., None, :]
        return y[..., :count, :].reshape(*x.shape[:-1], -1).astype(dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WithRounded[Weight]:
    """One parameter in two forms.

    Attributes:
      exact: the weight.
      rounded: the same in eight bits, for products that need not be exact.
    """

    exact: Weight
    rounded: Int8Weight

    def __getitem__(self, key: Ellipsis) -> WithRounded[Weight]:  # pyright: ignore[reportInvalidTypeForm]
        """Returns both forms, as modules read their parameters."""
        assert key is Ellipsis
        return self


def _rounded(x: Float[Array, "*batch in"]) -> tuple[Int[Array, "*batch in"], Float[Array, " *batch"]]:
    """Returns int8 values and the scale of each row; a row of zeros has a scale of zero."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / _LARGEST
    values = jnp.round(x / jnp.where(scale > 0, scale, 1)[..., None])
    return jnp.clip(values, -_LARGEST, _LARGEST).astype(jnp.int8), scale
