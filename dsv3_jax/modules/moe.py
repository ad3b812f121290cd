"""DeepSeekMoE: shared experts for every token, routed experts for some (report section 2.1.2, Eq. 12).

    h'_t = u_t + sum_i FFN^s_i(u_t) + sum_i g_{i,t} FFN^r_i(u_t)      (12)

The block adds u_t. The layer is dropless: tokens are sorted by expert and every assignment is computed, so the cost
follows the number of assignments and neither the number of experts nor their balance loses a token.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

import pallas_kernels
from dsv3_jax.config import ModelConfig
from dsv3_jax.modules.balance import Routing, balance_terms
from dsv3_jax.modules.devices import Devices, ExpertShapes, OneDevice
from dsv3_jax.modules.expert_blocks import NO_EXPERT, ExpertProducts, apply_experts
from dsv3_jax.modules.feed_forward import FeedForward
from dsv3_jax.modules.parameter import ParameterShape
from dsv3_jax.modules.router import Router
from dsv3_jax.precision import (
    ExpertNetworks,
    Precision,
    QuantizedRows,
    linear,
    linear_by_row,
    swiglu_linear,
)
from dsv3_jax.precision.by_layer import ByLayer, with_layer
from dsv3_jax.precision.int8_weight import Int8Weight
from dsv3_jax.precision.tiled_weight import TiledWeight
from pallas_kernels.device import target_platform


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Choice:
    """The experts that a layer chose while decoding.

    Attributes:
      load: int32, how many tokens chose each expert; padding is not counted.
      experts: int32, the experts of each token, best first; None where they are not kept.
    """

    load: Int[Array, " E"]
    experts: Int[Array, "B T K"] | None


class RoutedExperts(Protocol):
    """The routed experts of a mixture: a layer's own, or another arrangement of their weights."""

    def __call__(self, u: Float[Array, "*batch d"], gates: pallas_kernels.Gates) -> Float[Array, "*batch d"]: ...

    def of_few(
        self,
        u: Float[Array, "N d"],
        gates: pallas_kernels.Gates,
        token_mask: Bool[Array, " N"],
        layer: Int[Array, ""] | None,
    ) -> Float[Array, "N d"]: ...


class Experts(nnx.Module):
    """The routed experts of a layer, one SwiGLU network each, stacked on a leading axis.

    Args:
      gate_up, down: weights [E, 2, I, d] and [E, d, I], of `shapes`.
      precision: recipe of the products.
      devices: what brings tokens to their experts and back.
    """

    def __init__(
        self, gate_up: nnx.Param, down: nnx.Param, shapes: ExpertShapes, *, precision: Precision, devices: Devices
    ):
        self.shapes = shapes
        self.precision = precision
        self.networks = ExpertNetworks(precision)
        self.devices = devices
        self.gate_up = gate_up
        self.down = down

    @classmethod
    def initial(
        cls, config: ModelConfig, *, dtype: jnp.dtype, precision: Precision, devices: Devices, rngs: nnx.Rngs
    ) -> Experts:
        """Returns experts with random weights."""
        experts, d, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        shapes = ExpertShapes(
            gate_up=ParameterShape((experts, 2, width, d), ("expert", None, "expert_width", "embed")),
            down=ParameterShape((experts, d, width), ("expert", "embed", "expert_width")),
            groups=config.n_group,
            reached_groups=config.topk_group,
            fp8=precision.fp8,
            gather_dtype=precision.gather_dtype,
        )
        gate_up = shapes.gate_up.normal(rngs, config.initializer_range, dtype)
        down = shapes.down.normal(rngs, config.initializer_range, dtype)
        return cls(gate_up, down, shapes, precision=precision, devices=devices)

    def __call__(self, u: Float[Array, "*batch d"], gates: pallas_kernels.Gates) -> Float[Array, "*batch d"]:
        """Returns sum_i g_i FFN_i(u) of every token; `gates` has leading axes that flatten to the tokens of `u`."""
        return self._apply(u, gates, self.gate_up[...], self.down[...])

    def _apply(
        self, u: Float[Array, "*batch d"], gates: pallas_kernels.Gates, gate_up: Float[Array, "E 2 I d"], down: Array
    ) -> Float[Array, "*batch d"]:
        return self.devices.apply_experts(u, gates, gate_up, down, self.networks, self.shapes)

    def of_few(
        self,
        u: Float[Array, "N d"],
        gates: pallas_kernels.Gates,
        token_mask: Bool[Array, " N"],
        layer: Int[Array, ""] | None,
    ) -> Float[Array, "N d"]:
        """Returns the same while decoding; tokens where the mask is False get zeros.

        Args:
          layer: the layer, where this module holds the weights of all layers on a leading axis. Slicing one layer out
            would copy all of its experts, of which few tokens use few.
        """
        gate_up, down = self.gate_up[...], self.down[...]
        experts, _, width, d = gate_up.shape[-4:]
        tokens, chosen = u.shape[0], gates.expert_index.shape[-1]
        index = gates.expert_index.reshape(tokens, chosen)
        weights = jnp.where(token_mask[:, None], gates.gate.reshape(tokens, chosen), 0)
        on_cpu = isinstance(self.devices, OneDevice) and target_platform() == "cpu" and self.precision.fp8 is None
        if on_cpu:
            index = jnp.where(token_mask[:, None], index, NO_EXPERT)
            return apply_experts(u.astype(self.precision.dtype), index, weights, self._products_of(layer))
        if tokens * chosen > experts:
            gates = dataclasses.replace(gates, gate=weights.reshape(gates.gate.shape))
            return self._apply(u, gates, *((gate_up, down) if layer is None else (gate_up[layer], down[layer])))
        gate_up, down = gate_up.reshape(-1, 2 * width, d), down.reshape(-1, d, width)
        index += 0 if layer is None else layer * experts
        dtype = self.precision.dtype
        rows = jnp.repeat(u, chosen, axis=0)
        hidden = linear_by_row(rows, gate_up[index.reshape(-1)], self.precision)
        out = linear_by_row(hidden, down[index.reshape(-1)], self.precision, after_swiglu=True)
        out = out.reshape(tokens, chosen, d)
        wide = jnp.promote_types(dtype, jnp.float32)
        return jnp.sum(out.astype(wide) * weights[..., None].astype(wide), axis=1).astype(dtype)

    def _products_of(self, layer: Int[Array, ""] | None) -> ExpertProducts:
        """Returns the networks of a layer's experts on a CPU; `layer` is that of `of_few`."""
        gate_up, down = self.gate_up[...], self.down[...]
        experts, _, width, d = gate_up.shape[-4:]
        is_stack = layer is not None and not isinstance(gate_up, ByLayer)

        def of_one(gate_up: Any, down: Any, rows: Float[Array, "R d"], expert: Int[Array, ""]) -> Float[Array, "R d"]:
            expert += layer * experts if is_stack else 0
            hidden = linear(rows, gate_up.reshape(-1, 2 * width, d)[expert], self.precision).reshape(-1, 2, width)
            return swiglu_linear(hidden, down.reshape(-1, d, width)[expert], self.precision)

        def of_all(gate_up: Any, down: Any, rows: Float[Array, "E R d"]) -> Float[Array, "E R d"]:
            return self.networks(rows.reshape(-1, d), gate_up, down, None, 1).reshape(rows.shape)

        def of_rows(gate_up: Any, down: Any, rows: Float[Array, "S d"], index: Int[Array, " S"]) -> Float[Array, "S d"]:
            own = gate_up.reshape(-1, 2 * width, d)[index], down.reshape(-1, d, width)[index]
            if is_exact_by_row:
                return self.networks(rows, *own, None, 1)
            # Of two equal rows each, because a single one is multiplied by a kernel that adds in another order.
            return self.networks(jnp.repeat(rows, 2, axis=0), *own, None, 1)[::2]

        one = gate_up.layers[0] if isinstance(gate_up, ByLayer) else gate_up
        is_exact_by_row = isinstance(one, Int8Weight | TiledWeight)
        # Batched products of plain float32 arrays add in an order that depends on the number of rows.
        exact = not is_stack and (is_exact_by_row or self.precision.dtype != jnp.float32)
        return ExpertProducts(
            experts,
            with_layer(of_one, (gate_up, down), layer),
            with_layer(of_all, (gate_up, down), layer) if exact else None,
            with_layer(of_rows, (gate_up, down), layer) if exact else None,
            fewest_rows=1 if is_exact_by_row else 2,
        )


class MixtureOfExperts(nnx.Module):
    """Computes the two sums of Eq. 12 and the layer's routing statistics."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: jnp.dtype,
        precision: Precision,
        devices: Devices = OneDevice(),
        rngs: nnx.Rngs,
    ):
        self.devices = devices
        self.router = Router(config, dtype=dtype, devices=devices, rngs=rngs)
        self.experts: RoutedExperts = Experts.initial(
            config, dtype=dtype, precision=precision, devices=devices, rngs=rngs
        )
        self.has_shared_experts = config.n_shared_experts > 0
        if self.has_shared_experts:
            self.shared = FeedForward(
                config.hidden_size,
                config.n_shared_experts * config.moe_intermediate_size,
                scale=config.initializer_range,
                dtype=dtype,
                precision=precision,
                devices=devices,
                rngs=rngs,
            )

    def __call__(
        self,
        u: Float[Array, "B T d"] | QuantizedRows,
        token_mask: Bool[Array, "B T"] | None = None,
        experts: Int[Array, "B T K"] | None = None,
    ) -> tuple[Float[Array, "B T d"], Routing]:
        """Returns the layer's output and its routing statistics.

        Args:
          u: normed hidden states; those that are quantized for the shared experts hold the rows too.
          token_mask: False at tokens that are computed but not counted.
          experts: the experts of each token, instead of those that the router chooses.
        """
        rows = u.rows if isinstance(u, QuantizedRows) else u
        gates = self.router(rows, token_mask, experts)
        with jax.named_scope("routed_experts"):
            routed = self.experts(rows, gates)
        sequence_balance, batch_balance = balance_terms(
            gates.selection_fraction, gates.affinity_mean, token_mask, sum_over_batch=self.devices.sum_over_batch
        )
        routing = Routing(load=gates.load, sequence_balance=sequence_balance, batch_balance=batch_balance)
        return self._with_shared(u, routed), routing

    def decode(
        self, u: Float[Array, "B T d"], token_mask: Bool[Array, "B T"], layer: Int[Array, ""] | None
    ) -> tuple[Float[Array, "B T d"], Choice]:
        """Returns the layer's output for a few tokens, and the experts that they chose.

        Args:
          token_mask: False at padding, which no expert computes.
          layer: the layer whose experts are read from the stack of all layers' weights, if they are stacked.
        """
        gates = self.router(u, token_mask)
        with jax.named_scope("routed_experts"):
            routed = self.experts.of_few(u.reshape(-1, u.shape[-1]), gates, token_mask.reshape(-1), layer)
        return self._with_shared(u, routed), Choice(gates.load, gates.expert_index)

    def _with_shared(
        self, u: Float[Array, "B T d"] | QuantizedRows, routed: Float[Array, "*batch d"]
    ) -> Float[Array, "B T d"]:
        y = routed.reshape(u.shape).astype((u.rows if isinstance(u, QuantizedRows) else u).dtype)
        if not self.has_shared_experts:
            return y
        with jax.named_scope("shared_experts"):
            return y + self.shared(u)
