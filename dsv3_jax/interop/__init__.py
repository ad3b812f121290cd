"""Checkpoints in the published layout: in, exactly and within memory, and out again."""

from dsv3_jax.interop.importer import load_hf

__all__ = ["load_hf"]
