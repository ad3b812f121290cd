"""Section 3.3 of the report: what is computed in which format."""

from dsv3_jax.precision.linear import grouped_linear, linear
from dsv3_jax.precision.recipe import PRECISIONS, Precision

__all__ = ["PRECISIONS", "Precision", "grouped_linear", "linear"]
