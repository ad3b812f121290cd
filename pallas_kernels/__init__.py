"""Kernels of the DeepSeek-V3 system: arrays in, arrays out, on jax alone."""

from pallas_kernels.grouped_matmul import grouped_matmul, preferred_row_alignment
from pallas_kernels.routing import Gates, Permutation, combine, gate, permute

__all__ = [
    "Gates",
    "Permutation",
    "combine",
    "gate",
    "grouped_matmul",
    "permute",
    "preferred_row_alignment",
]
