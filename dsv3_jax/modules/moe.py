"""DeepSeekMoE: shared experts for every token, routed experts for some (report section 2.1.2, Eq. 12).

    h'_t = u_t + sum_i FFN^s_i(u_t) + sum_i g_{i,t} FFN^r_i(u_t)      (12)

The block adds u_t. The layer is dropless: tokens are sorted by expert and every assignment is computed, so the cost
follows the number of assignments and neither the number of experts nor their balance loses a token.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

import pallas_kernels
from dsv3_jax.config import ModelConfig
from dsv3_jax.modules.balance import Routing, balance_terms
from dsv3_jax.modules.devices import Devices, ExpertShapes, OneDevice
from dsv3_jax.modules.feed_forward import FeedForward
from dsv3_jax.modules.parameter import ParameterShape
from dsv3_jax.modules.router import Router
from dsv3_jax.precision import Precision, grouped_linear, grouped_swiglu_linear, linear_by_row
from dsv3_jax.precision.keeping import keep


class RoutedExperts(Protocol):
    """The routed experts of a mixture: a layer's own, or another arrangement of their weights."""

    def __call__(self, u: Float[Array, "N d"], gates: pallas_kernels.Gates) -> Float[Array, "N d"]: ...

    def of_layer(
        self, u: Float[Array, "N d"], gates: pallas_kernels.Gates, layer: Int[Array, ""]
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
        )
        gate_up = shapes.gate_up.normal(rngs, config.initializer_range, dtype)
        down = shapes.down.normal(rngs, config.initializer_range, dtype)
        return cls(gate_up, down, shapes, precision=precision, devices=devices)

    def __call__(self, u: Float[Array, "N d"], gates: pallas_kernels.Gates) -> Float[Array, "N d"]:
        """Returns sum_i g_i FFN_i(u) of every token; `gates` has leading axes that flatten to the N tokens."""
        return self._apply(u, gates, self.gate_up[...], self.down[...])

    def _apply(
        self, u: Float[Array, "N d"], gates: pallas_kernels.Gates, gate_up: Float[Array, "E 2 I d"], down: Array
    ) -> Float[Array, "N d"]:
        return self.devices.apply_experts(u, gates, gate_up, down, self._products, self.shapes)

    def _products(
        self,
        rows: Float[Array, "M d"],
        gate_up: Float[Array, "E 2 I d"],
        down: Float[Array, "E d I"],
        group_sizes: Int[Array, " E"],
        row_alignment: int,
    ) -> Float[Array, "M d"]:
        """Returns FFN_i of rows sorted by expert i."""
        experts, _, width, d = gate_up.shape
        apply: dict[str, Any] = {
            "group_sizes": group_sizes,
            "row_alignment": row_alignment,
            "precision": self.precision,
        }
        hidden = grouped_linear(rows, gate_up.reshape(experts, 2 * width, d), **apply)
        return keep(grouped_swiglu_linear(hidden, down, **apply))

    def of_layer(
        self, u: Float[Array, "N d"], gates: pallas_kernels.Gates, layer: Int[Array, ""]
    ) -> Float[Array, "N d"]:
        """Returns the same while decoding, where this module holds the weights of all layers on a leading axis.

        A few tokens need the weights of a few experts: they are gathered from where they are stored, and neither a
        layer's other experts nor an order by expert is touched. Many tokens are computed as in training.
        """
        layers, experts, _, width, d = self.gate_up.shape
        chosen = gates.expert_index.reshape(-1)
        if chosen.size > experts:
            return self._apply(u, gates, self.gate_up[...][layer], self.down[...][layer])
        dtype = self.precision.dtype
        index = layer * experts + chosen
        gate_up = self.gate_up[...].reshape(layers * experts, 2 * width, d)[index]
        down = self.down[...].reshape(layers * experts, d, width)[index]
        tokens = jnp.repeat(u, gates.expert_index.shape[-1], axis=0)
        hidden = linear_by_row(tokens, gate_up, self.precision)
        out = linear_by_row(hidden, down, self.precision, after_swiglu=True).reshape(u.shape[0], -1, d)
        wide = jnp.promote_types(dtype, jnp.float32)
        weights = gates.gate.reshape(u.shape[0], -1, 1).astype(wide)
        return jnp.sum(out.astype(wide) * weights, axis=1).astype(dtype)


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
        u: Float[Array, "B T d"],
        token_mask: Bool[Array, "B T"] | None = None,
        *,
        expert_layer: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T d"], Routing]:
        """Returns the layer's output and its routing statistics.

        Args:
          token_mask: False at tokens that are computed but not counted.
          expert_layer: while decoding, the layer whose experts are read from the stack of all layers' weights.
        """
        gates = self.router(u, token_mask)
        flat = u.reshape(-1, u.shape[-1])
        with jax.named_scope("routed_experts"):
            if expert_layer is None:
                routed = self.experts(flat, gates)
            else:
                routed = self.experts.of_layer(flat, gates, expert_layer)
        y = routed.reshape(u.shape).astype(u.dtype)
        if self.has_shared_experts:
            with jax.named_scope("shared_experts"):
                y = y + self.shared(u)
        sequence_balance, batch_balance = balance_terms(
            gates.selection_fraction, gates.affinity_mean, token_mask, sum_over_batch=self.devices.sum_over_batch
        )
        return y, Routing(load=gates.load, sequence_balance=sequence_balance, batch_balance=batch_balance)
