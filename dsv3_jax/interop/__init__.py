"""Checkpoints in the published layout: in, exactly and within memory, and out again."""

from dsv3_jax.interop.exporter import save_hf
from dsv3_jax.interop.fp8_parameter import Fp8Weight
from dsv3_jax.interop.importer import architecture_of, load_hf

__all__ = ["Fp8Weight", "architecture_of", "load_hf", "save_hf"]
