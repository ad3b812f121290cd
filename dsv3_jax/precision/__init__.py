"""Precision recipes (report section 3.3): which products are computed in which format, and what they keep."""

from dsv3_jax.precision.attended import AttendedRows, KeptOutput
from dsv3_jax.precision.expert_networks import ExpertNetworks
from dsv3_jax.precision.fp8_recipe import Fp8Recipe
from dsv3_jax.precision.linear import (
    grouped_linear,
    grouped_swiglu_linear,
    linear,
    linear_by_row,
    rounded_weight,
    swiglu_linear,
)
from dsv3_jax.precision.normed import normed_rows, quantizes_norms
from dsv3_jax.precision.prepared import PreparedRows, QuantizedRows
from dsv3_jax.precision.recipe import PRECISIONS, Precision
from dsv3_jax.precision.saved import saved_bytes
from dsv3_jax.precision.swiglu import swiglu

__all__ = [
    "PRECISIONS",
    "AttendedRows",
    "ExpertNetworks",
    "Fp8Recipe",
    "KeptOutput",
    "Precision",
    "PreparedRows",
    "QuantizedRows",
    "grouped_linear",
    "grouped_swiglu_linear",
    "linear",
    "linear_by_row",
    "normed_rows",
    "quantizes_norms",
    "rounded_weight",
    "saved_bytes",
    "swiglu",
    "swiglu_linear",
]
