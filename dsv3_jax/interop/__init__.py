"""Import and export of checkpoints in the published layout."""

from dsv3_jax.interop.exporter import save_hf
from dsv3_jax.interop.importer import architecture_of, load_hf
from dsv3_jax.precision.fp8_weight import Fp8Weight

__all__ = ["Fp8Weight", "architecture_of", "load_hf", "save_hf"]
