"""Kernels of the DeepSeek-V3 system: arrays in, arrays out, on jax alone."""

from pallas_kernels.blockwise_matmul import blockwise_matmul
from pallas_kernels.grouped_matmul import (
    grouped_matmul,
    grouped_weight_gradient,
    masked_grouped_matmul,
    preferred_row_alignment,
)
from pallas_kernels.latent_attention import has_attention_kernel, latent_attention, latent_attention_and_kept
from pallas_kernels.latent_decode import has_decode_kernel, latent_decode
from pallas_kernels.quantize import (
    PROMOTION_INTERVAL,
    TILE,
    Quantized,
    dequantize,
    quantize,
    quantize_both,
    requantize_transposed,
)
from pallas_kernels.rms_norm import quantize_rms_norm, rms_norm_gradient
from pallas_kernels.routing import Gates, Permutation, combine, gate, gates_of_experts, order_by_expert, permute
from pallas_kernels.swiglu import quantize_swiglu, swiglu_gradient

__all__ = [
    "PROMOTION_INTERVAL",
    "TILE",
    "Gates",
    "Permutation",
    "Quantized",
    "blockwise_matmul",
    "combine",
    "dequantize",
    "gate",
    "gates_of_experts",
    "grouped_matmul",
    "grouped_weight_gradient",
    "has_attention_kernel",
    "has_decode_kernel",
    "latent_attention",
    "latent_attention_and_kept",
    "latent_decode",
    "masked_grouped_matmul",
    "order_by_expert",
    "permute",
    "preferred_row_alignment",
    "quantize",
    "quantize_both",
    "quantize_rms_norm",
    "quantize_swiglu",
    "requantize_transposed",
    "rms_norm_gradient",
    "swiglu_gradient",
]
