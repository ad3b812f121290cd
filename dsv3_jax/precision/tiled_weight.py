"""Float32 weights in tiles of 64 outputs, for generation on a CPU.

XLA's CPU backend copies the weights of most products into another layout before each multiplication, and it chooses the
order of additions by the number of rows. A tile is multiplied as it is stored, and its sums are added in the order of
the inputs for any number of rows, one included: a row's result is the same bits in every batch.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

_OUTPUTS = 64  # of a tile: fewer, or more than `_MOST_INPUTS` inputs, are added in several orders
_MOST_INPUTS = 512
_FEWEST_TILES = 2  # a single one would be multiplied as a plain matrix


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TiledWeight:
    """One parameter, which modules read as they read an array.

    Attributes:
      values: [*stack, parts * tiles * inputs of a part * 64], filled up with zeros. On one axis XLA
        slices the tiles of a matrix out of a stack as one piece of memory, which takes less time than on three.
      out_shape, in_shape: sizes of the output and input axes of the array that the weight replaces.
    """

    values: Float[Array, "..."]
    out_shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    in_shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, weight: Float[Array, "..."], in_axes: int = 1, stack_axes: int = 0) -> TiledWeight:
        """Returns the tiles of a weight [*stack, *out, *in] with that many stack and input axes."""
        stack = weight.shape[:stack_axes]
        out, inputs = weight.shape[stack_axes : weight.ndim - in_axes], weight.shape[weight.ndim - in_axes :]
        columns, rows = math.prod(out), math.prod(inputs)
        parts, tiles, width = _divided(columns, rows)
        matrix = weight.reshape(*stack, columns, rows)
        nothing = [(0, 0)] * stack_axes
        matrix = jnp.pad(matrix, [*nothing, (0, tiles * _OUTPUTS - columns), (0, parts * width - rows)])
        values = matrix.reshape(*stack, tiles, _OUTPUTS, parts, width)
        axes = [stack_axes + axis for axis in (2, 0, 3, 1)]
        values = values.transpose(*range(stack_axes), *axes)
        return cls(values.reshape(*stack, -1), out, inputs)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that the weight replaces."""
        return (*self.values.shape[:-1], *self.out_shape, *self.in_shape)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the values."""
        return self.values.dtype

    @property
    def ndim(self) -> int:
        """The number of axes of `shape`."""
        return len(self.shape)

    def __getitem__(self, key: Int[Array, "..."] | int | Ellipsis) -> TiledWeight:  # pyright: ignore[reportInvalidTypeForm]
        """Returns the whole weight for `...`, or the matrices that an index, or an array of indices, selects."""
        return self if key is Ellipsis else dataclasses.replace(self, values=self.values[key])

    def reshape(self, *shape: int) -> TiledWeight:
        """Returns the weights under another shape [*stack, *out, in], `in` being all inputs; one size may be -1."""
        if -1 in shape:
            rest = math.prod(self.shape) // -math.prod(shape)
            shape = tuple(rest if size == -1 else size for size in shape)
        stack_axes = len(shape) - 1
        while math.prod(shape[stack_axes:-1]) < math.prod(self.out_shape):
            stack_axes -= 1
        values = self.values.reshape(*shape[:stack_axes], self.values.shape[-1])
        assert shape[-1] == math.prod(self.in_shape)
        return TiledWeight(values, shape[stack_axes:-1], shape[-1:])

    def product(self, x: Float[Array, "*batch in"], dtype: jax.typing.DTypeLike) -> Float[Array, "*batch out"]:
        """Returns y = W x for one matrix [out, in], or for a stack of them, each with rows x [*stack, rows, in]."""
        stack = self.values.shape[:-1]
        rows = x.reshape(*stack, -1, x.shape[-1]).astype(self.dtype)
        count, columns = rows.shape[-2], math.prod(self.out_shape)
        parts, tiles, width = _divided(columns, x.shape[-1])
        nothing = [(0, 0)] * len(stack)
        # XLA's own kernel for a single row may round products before it adds them: another row is put below it.
        rows = jnp.pad(rows, [*nothing, (0, count == 1), (0, parts * width - x.shape[-1])])
        of_parts = jnp.moveaxis(rows.reshape(*rows.shape[:-1], parts, width), -2, -3)
        for_tiles = jnp.broadcast_to(of_parts[..., None, :, :], (*stack, parts, tiles, *of_parts.shape[-2:]))
        values = lax.optimization_barrier(self.values)  # XLA would slice out three axes instead of one
        values = values.reshape(-1, width, _OUTPUTS)
        contract = (((2,), (1,)), ((0,), (0,)))
        sums = lax.dot_general(for_tiles.reshape(-1, *of_parts.shape[-2:]), values, contract)
        sums = sums.reshape(*stack, parts, tiles, -1, _OUTPUTS)
        sums = lax.optimization_barrier(sums)  # XLA may leave out the filling, and add the rest in another order
        total = sums[..., 0, :, :, :]
        for part in range(1, parts):
            total += sums[..., part, :, :, :]
        y = total.swapaxes(-2, -3).reshape(*stack, rows.shape[-2], -1)[..., :count, :columns]
        return y.reshape(*x.shape[:-1], columns).astype(dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AbsorbedWeight:
    """The up-projections of keys and values, [*stack, H, nope + v, r], as decoding absorbs them.

    Attributes:
      key: [*stack, H, r, nope], which a query is multiplied by.
      value: [*stack, H, v, r], which a sum of latents is multiplied by.
    """

    key: TiledWeight
    value: TiledWeight

    @classmethod
    def of(cls, weight: Float[Array, "*stack H out r"], keys: int) -> AbsorbedWeight:
        """Returns the tiles of a weight whose first `keys` outputs are of keys."""
        key, value = jnp.split(weight, [keys], axis=-2)
        stack_axes = weight.ndim - 2
        return cls(TiledWeight.of(key.mT, 1, stack_axes), TiledWeight.of(value, 1, stack_axes))

    def __getitem__(self, key: Ellipsis) -> AbsorbedWeight:  # pyright: ignore[reportInvalidTypeForm]
        """Returns the whole weight, as modules read their parameters."""
        assert key is Ellipsis
        return self


def _divided(columns: int, rows: int) -> tuple[int, int, int]:
    """Returns the parts of so many inputs, the tiles of so many outputs, and the inputs of a part."""
    parts, tiles = -(-rows // _MOST_INPUTS), max(-(-columns // _OUTPUTS), _FEWEST_TILES)
    return parts, tiles, -(-rows // parts)
