"""DeepSeekMoE: shared experts for every token, routed experts for some (report section 2.1.2, Eq. 12).

Dropless: tokens are sorted by expert and every assignment is computed, so cost follows the assignments and neither
the number of experts nor their balance loses a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

import pallas_kernels
from dsv3_jax.config import ModelConfig
from dsv3_jax.modules.feed_forward import FeedForward
from dsv3_jax.modules.linear import normal
from dsv3_jax.modules.router import Router
from dsv3_jax.modules.routing_statistics import Routing, balance_terms, whole_batch
from dsv3_jax.precision import Precision, grouped_linear, grouped_swiglu_linear, swiglu
from dsv3_jax.precision.keeping import keep


class Experts(nnx.Module):
    """The routed experts of a layer, one SwiGLU network each, stacked on a leading axis."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, precision: Precision, rngs: nnx.Rngs):
        self.precision = precision
        self.exchange: Any = None  # what carries tokens to experts on other devices; here all are
        experts, d, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        scale = config.initializer_range
        self.gate_up = nnx.Param(normal(rngs, (experts, 2, width, d), scale, dtype))
        self.down = nnx.Param(normal(rngs, (experts, d, width), scale, dtype))

    def __call__(self, u: Float[Array, "N d"], gates: pallas_kernels.Gates) -> Float[Array, "N d"]:
        """sum_i g_i E_i(u) for every token; `gates` has leading axes that flatten to the N tokens."""
        if self.exchange is not None:
            return self.exchange(u, gates, self.gate_up[...], self.down[...], self._products)
        return self._sorted_by_expert(u, gates, self.gate_up[...], self.down[...])

    def _sorted_by_expert(
        self, u: Float[Array, "N d"], gates: pallas_kernels.Gates, gate_up: Float[Array, "E 2 I d"], down: Array
    ) -> Float[Array, "N d"]:
        experts = gate_up.shape[0]
        chosen = gates.expert_index.shape[-1]
        expert_index = gates.expert_index.reshape(-1, chosen)
        alignment = pallas_kernels.preferred_row_alignment(expert_index.size, experts)
        rows, permutation = pallas_kernels.permute(u, expert_index, experts, row_alignment=alignment)
        out = self._products(rows, gate_up, down, permutation.group_sizes, alignment)
        return pallas_kernels.combine(out, gates.gate.reshape(-1, chosen), permutation)

    def _products(
        self,
        rows: Float[Array, "M d"],
        gate_up: Float[Array, "E 2 I d"],
        down: Float[Array, "E d I"],
        group_sizes: Int[Array, " E"],
        row_alignment: int,
    ) -> Float[Array, "M d"]:
        """E_i of rows sorted by expert."""
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
        """The same for decoding, where this module holds the weights of all layers, stacked on a leading axis.

        A few tokens need the weights of a few experts: they are read in place, and neither a layer's other experts
        nor an order by expert is touched. Many tokens go the usual way.
        """
        layers, experts, _, width, d = self.gate_up.shape
        chosen = gates.expert_index.reshape(-1)
        if chosen.size > experts:
            return self._sorted_by_expert(u, gates, self.gate_up[...][layer], self.down[...][layer])
        dtype = self.precision.dtype
        place = layer * experts + chosen
        gate_up = self.gate_up[...].reshape(layers * experts, 2 * width, d)[place].astype(dtype)
        down = self.down[...].reshape(layers * experts, d, width)[place].astype(dtype)
        tokens = jnp.repeat(u.astype(dtype), gates.expert_index.shape[-1], axis=0)
        hidden = swiglu(jnp.einsum("sd,sfd->sf", tokens, gate_up).reshape(-1, 2, width))
        out = jnp.einsum("si,sdi->sd", hidden, down).reshape(u.shape[0], -1, d)
        wide = jnp.promote_types(dtype, jnp.float32)
        weights = gates.gate.reshape(u.shape[0], -1, 1).astype(wide)
        return jnp.sum(out.astype(wide) * weights, axis=1).astype(dtype)


class MixtureOfExperts(nnx.Module):
    """y = Shared(u) + sum over the chosen experts of g_i E_i(u)."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, precision: Precision, rngs: nnx.Rngs):
        self.over_ranks: Callable[[Array], Array] = whole_batch  # or what sums over other ranks' parts of the batch
        self.router = Router(config, dtype=dtype, rngs=rngs)
        self.experts = Experts(config, dtype=dtype, precision=precision, rngs=rngs)
        self.has_shared_experts = config.n_shared_experts > 0
        if self.has_shared_experts:
            self.shared = FeedForward(
                config.hidden_size,
                config.n_shared_experts * config.moe_intermediate_size,
                scale=config.initializer_range,
                dtype=dtype,
                precision=precision,
                rngs=rngs,
            )

    def __call__(
        self,
        u: Float[Array, "B T d"],
        token_mask: Bool[Array, "B T"] | None = None,
        *,
        expert_layer: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T d"], Routing]:
        """The layer's output and its routing statistics; tokens outside `token_mask` are computed but not counted.

        With `expert_layer` the experts hold all layers' weights and this one's are read from them (decoding).
        """
        gates = self.router(u, token_mask)
        flat = u.reshape(-1, u.shape[-1])
        routed = self.experts(flat, gates) if expert_layer is None else self.experts.of_layer(flat, gates, expert_layer)
        y = routed.reshape(u.shape).astype(u.dtype)
        if self.has_shared_experts:
            y = y + self.shared(u)
        sequence_balance, batch_balance = balance_terms(
            gates.selection_fraction, gates.affinity_mean, token_mask, over_ranks=self.over_ranks
        )
        return y, Routing(load=gates.load, sequence_balance=sequence_balance, batch_balance=batch_balance)
