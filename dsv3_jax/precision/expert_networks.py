"""The networks of experts, applied to rows that are sorted by expert, and their gradients in two halves.

    E_i(x) = W_down (silu(W_gate x) * W_up x)

The first half of the backward pass gives the gradients by rows and gates, the second half those by the weights. Between
them operands can be collected: then one product adds up what many pieces of tokens contribute. The forward pass is not
kept but computed again, as far as gradients need it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import pallas_kernels as pk
from dsv3_jax.precision import fp8_layer
from dsv3_jax.precision.fp8_recipe import Fp8Recipe, Role
from dsv3_jax.precision.fp8_weight import Fp8Weight
from dsv3_jax.precision.keeping import keep
from dsv3_jax.precision.linear import grouped_linear, grouped_swiglu_linear
from dsv3_jax.precision.prepared import QuantizedRows
from dsv3_jax.precision.recipe import Precision
from dsv3_jax.precision.swiglu import swiglu
from dsv3_jax.precision.tiles import Tiles
from pallas_kernels import TILE
from pallas_kernels.grouped_matmul.alignment import align, take_rows

Weights = tuple[Any, Any]
"""The experts' gate and up projections [E, 2, I, d], and their down projections [E, d, I]; arrays or `Fp8Weight`s."""

_AFTER_SWIGLU = Role(swiglu=True, gradient_dispatched=True)


class WeightOperands(NamedTuple):
    """What the gradients by the weights are computed from. Those of several pieces can be stacked on a leading axis.

    Attributes:
      gate_up, down: the operands of the two products over rows; None for a constant weight.
      group_sizes: rows of each expert.
    """

    gate_up: tuple[Any, Any] | None
    down: tuple[Any, Any] | None
    group_sizes: Int[Array, "*P E"]


@dataclasses.dataclass(frozen=True)
class ExpertNetworks:
    """Applies the networks of experts under a precision recipe."""

    precision: Precision

    def __call__(
        self,
        rows: Float[Array, "M d"] | QuantizedRows,
        gate_up: Float[Array, "E 2 I d"] | Fp8Weight,
        down: Float[Array, "E d I"] | Fp8Weight,
        group_sizes: Int[Array, " E"] | None,
        row_alignment: int,
    ) -> Float[Array, "M d"]:
        """Returns E_i(row) of rows sorted by expert i: `group_sizes[i]` of them, or equally many without sizes.

        Args:
          rows: an array; or rows that were sent to the experts in FP8, under a recipe that sends them so.
          row_alignment: the sizes are multiples of it.
        """
        apply: dict[str, Any] = {
            "group_sizes": group_sizes,
            "row_alignment": row_alignment,
            "precision": self.precision,
        }
        hidden = grouped_linear(rows, _as_matrices(gate_up), **apply)
        return keep(grouped_swiglu_linear(hidden, down, **apply))

    def combined(
        self,
        rows: Float[Array, "M d"],
        gates: Float[Array, "N K"],
        weights: Weights,
        permutation: pk.Permutation,
        row_alignment: int,
    ) -> Float[Array, "N d"]:
        """Returns sum_k gates[n, k] * E_k of the row of token n's k-th expert; `permutation` says where that row is.

        In FP8 the gradient of a row's result is quantized before the gate scales it, as it is where it is sent to the
        experts. It needs row_alignment 128.
        """
        recipe = self.precision.fp8
        if recipe is None:
            out = self(rows, *weights, permutation.group_sizes, row_alignment)
            return pk.combine(out, gates, permutation)
        hidden = grouped_linear(
            rows,
            _as_matrices(weights[0]),
            permutation.group_sizes,
            row_alignment=row_alignment,
            precision=self.precision,
        )
        return _combined(recipe, hidden, weights[1], gates, permutation)

    def laid_out(self, weights: Weights) -> Weights:
        """Returns weights as products read them, so that a loop does not convert or transpose them in every pass."""
        gate_up, down = (self._laid_out(_as_matrices(weight)) for weight in weights)
        return gate_up, down

    def _laid_out(self, weight: Float[Array, "E out in"] | Fp8Weight) -> Array | Fp8Weight:
        recipe = self.precision.fp8
        if recipe is None:
            return weight.astype(self.precision.dtype)
        if not isinstance(weight, Fp8Weight) and self.precision.gather_dtype == jnp.float8_e4m3fn:
            tiles = fp8_layer.weight_tiles(weight, recipe)
            weight = Fp8Weight(tiles.values, tiles.scales, columns=weight.shape[-1], gradient=weight)
        return weight.laid_out() if isinstance(weight, Fp8Weight) else weight

    def row_gradients(
        self,
        rows: Float[Array, "M d"] | QuantizedRows,
        gates: Float[Array, " M"],
        weights: Weights,
        group_sizes: Int[Array, " E"],
        row_alignment: int,
        out_bar: Float[Array, "M d"] | Tiles,
    ) -> tuple[Float[Array, "M d"], Float[Array, " M"], WeightOperands]:
        """Returns the first half of the backward pass of gates * E_i(row): the gradients by rows and by gates.

        The products that gates scale are not computed again: a gate's gradient is the sum of the activation times the
        gradient of the down projection's input.

        Args:
          gates: of at least float32.
          out_bar: the gradient of the result; in FP8 if it arrived so.
        """
        if self.precision.fp8 is None:
            assert isinstance(rows, jax.Array)
            assert isinstance(out_bar, jax.Array)
            return self._plain_row_gradients(rows, gates, weights, group_sizes, row_alignment, out_bar)
        if row_alignment % TILE == 0:
            return self._fp8_row_gradients(rows, gates, weights, group_sizes, out_bar)
        layout = align(rows.shape[0], group_sizes, TILE)
        wide: Any = jax.tree.map(lambda part: take_rows(part, layout.source), (rows, gates, out_bar))
        rows_bar, gates_bar, operands = self._fp8_row_gradients(wide[0], wide[1], weights, layout.group_sizes, wide[2])
        return take_rows(rows_bar, layout.destination), take_rows(gates_bar, layout.destination), operands

    def _plain_row_gradients(
        self,
        rows: Array,
        gates: Array,
        weights: Weights,
        group_sizes: Array,
        row_alignment: int,
        out_bar: Array,
    ) -> tuple[Array, Array, WeightOperands]:
        dtype = self.precision.dtype
        gate_up, down = (_as_matrices(weight).astype(dtype) for weight in weights)
        product = functools.partial(
            pk.grouped_matmul, group_sizes=group_sizes, row_alignment=row_alignment, out_dtype=dtype
        )
        hidden, pull_rows = jax.vjp(lambda rows: product(rows, gate_up), rows.astype(dtype))
        activation, pull_hidden = jax.vjp(lambda hidden: swiglu(hidden.reshape(len(hidden), 2, -1)), hidden)
        wide = jax.vjp(lambda activation: product(activation, down), activation)[1](out_bar)[0].astype(gates.dtype)
        (hidden_bar,) = pull_hidden((wide * gates[:, None]).astype(dtype))
        gated = (out_bar.astype(gates.dtype) * gates[:, None]).astype(dtype)
        operands = WeightOperands((hidden_bar, rows.astype(dtype)), (gated, activation), group_sizes)
        return pull_rows(hidden_bar)[0], jnp.sum(activation.astype(gates.dtype) * wide, axis=1), operands

    def _fp8_row_gradients(
        self,
        rows: Array | QuantizedRows,
        gates: Array,
        weights: Weights,
        group_sizes: Array,
        out_bar: Array | Tiles,
    ) -> tuple[Array, Array, WeightOperands]:
        recipe, dtype = self.precision.fp8, self.precision.dtype
        assert recipe is not None
        gate_up, down = _as_matrices(weights[0]), weights[1]
        first, second = Role(dispatched=True), _AFTER_SWIGLU
        array, tiles = QuantizedRows.parts(rows)
        hidden, of_gate_up = fp8_layer.forward(array.astype(dtype), tiles, gate_up, group_sizes, recipe, first)
        kept, stored = fp8_layer.kept_before_swiglu(hidden, recipe), fp8_layer.weight_tiles(down, recipe)
        of_down = fp8_layer.Residuals.of(kept, down, stored, group_sizes, recipe, second)
        hidden_bar, gates_bar, down_operands = fp8_layer.input_gradient(of_down, out_bar, recipe, second, dtype, gates)
        rows_bar, _, operands = fp8_layer.input_gradient(of_gate_up, hidden_bar, recipe, first, dtype)
        assert gates_bar is not None
        return rows_bar, gates_bar, WeightOperands(operands, down_operands, group_sizes)

    def add_weight_gradients(self, total: Weights, operands: WeightOperands, row_alignment: int) -> Weights:
        """Returns `total` with the second half of the backward pass: the gradients by the weights, over all pieces.

        Args:
          total: gradients in the form of the weights. What is there of constants is returned.
        """
        recipe, sizes = self.precision.fp8, operands.group_sizes

        def added(total: Any, of_weight: tuple[Any, Any] | None) -> Any:
            array = total.gradient if isinstance(total, Fp8Weight) else total
            if of_weight is None or array is None:
                return total
            before = _as_matrices(array) if array.dtype == jnp.float32 else None  # which products add to by themselves
            if recipe is None:
                options = {"accumulator": before, "row_alignment": row_alignment}
                bar = pk.grouped_weight_gradient(*of_weight, sizes, **options)
            else:
                bar = fp8_layer.weight_gradient(of_weight, sizes, recipe, before)
            bar = bar.reshape(array.shape)
            array = array + bar.astype(array.dtype) if before is None else bar
            return dataclasses.replace(total, gradient=array) if isinstance(total, Fp8Weight) else array

        return added(total[0], operands.gate_up), added(total[1], operands.down)


def _as_matrices(weight: Any) -> Any:
    """Returns weights as one matrix [out, in] for each expert, gate and up below each other."""
    return weight.reshape(weight.shape[0], -1, weight.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _combined(
    recipe: Fp8Recipe,
    hidden: Float[Array, "M 2*I"],
    down: Float[Array, "E d I"] | Fp8Weight,
    gates: Float[Array, "N K"],
    permutation: pk.Permutation,
) -> Any:
    """Returns the gated sums of the down projections of SwiGLU's outputs."""
    return _combined_forward(recipe, hidden, down, gates, permutation)[0]


def _combined_forward(
    recipe: Fp8Recipe, hidden: Array, down: Any, gates: Array, permutation: pk.Permutation
) -> tuple[Array, Any]:
    out, residuals = fp8_layer.forward(hidden, None, down, permutation.group_sizes, recipe, _AFTER_SWIGLU)
    return pk.combine(out, gates, permutation), (residuals, gates, permutation, jnp.empty(0, hidden.dtype))


def _combined_backward(recipe: Fp8Recipe, saved: Any, y_bar: Float[Array, "N d"]) -> tuple[Any, ...]:
    residuals, gates, permutation, like = saved
    entry, wide = permutation.slot_of_row, jnp.promote_types(gates.dtype, jnp.float32)
    out_bar = take_rows(y_bar.astype(like.dtype), entry // gates.shape[1])
    gate = take_rows(gates.reshape(-1).astype(wide), entry)
    hidden_bar, gate_bar, operands = fp8_layer.input_gradient(
        residuals, out_bar, recipe, _AFTER_SWIGLU, like.dtype, gate
    )
    assert gate_bar is not None
    gates_bar = gate_bar[permutation.row_of_slot].reshape(gates.shape).astype(gates.dtype)
    if operands is None:
        return hidden_bar, None, gates_bar, None
    weight_bar = fp8_layer.weight_gradient(operands, residuals.group_sizes, recipe)
    return hidden_bar, fp8_layer.gradient_by(residuals.weight, weight_bar, residuals.like.dtype), gates_bar, None


_combined.defvjp(_combined_forward, _combined_backward)
