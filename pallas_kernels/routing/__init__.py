"""MoE routing: the gate, and the permutation of tokens to expert order and back (report section 2.1.2)."""

from pallas_kernels.routing.gating import Gates, gate, gates_of_experts
from pallas_kernels.routing.permutation import Permutation, combine, order_by_expert, permute

__all__ = ["Gates", "Permutation", "combine", "gate", "gates_of_experts", "order_by_expert", "permute"]
