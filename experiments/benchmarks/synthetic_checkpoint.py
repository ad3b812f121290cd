"""Writes a random checkpoint of any size in the published layout, one tensor at a time.

    python experiments/benchmarks/synthetic_checkpoint.py FOLDER --gigabytes 4 [--dtype bfloat16|fp8|float32]

The architecture is V3's with a quarter of its widths, fewer experts, and as many layers as fill the given size. Shards
have about a gigabyte.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dsv3_jax import ModelConfig
from dsv3_jax.interop.exporter import split_into_shards
from dsv3_jax.interop.hf_config import to_published
from dsv3_jax.interop.safetensors_reader import DTYPES
from dsv3_jax.interop.safetensors_writer import TensorSpec, write_safetensors
from dsv3_jax.interop.stored_format import DtypeName, uniform_format

_BYTES = {"bfloat16": 2, "fp8": 1, "float32": 4}


def architecture(gigabytes: float, dtype: DtypeName) -> ModelConfig:
    """Returns a V3 of a quarter of the widths, with as many layers as fill `gigabytes`."""

    def config(layers: int) -> ModelConfig:
        return ModelConfig.preset(
            "v3-671b",
            hidden_size=1792,
            intermediate_size=4608,
            moe_intermediate_size=512,
            num_attention_heads=32,
            q_lora_rank=384,
            n_routed_experts=64,
            num_experts_per_tok=8,
            vocab_size=32768,
            num_hidden_layers=layers,
            first_k_dense_replace=1,
        )

    layers = 2
    while config(layers).num_parameters(mtp=True) * _BYTES[dtype] < gigabytes * 1e9:
        layers += 1
    return config(layers)


def write(folder: Path, config: ModelConfig, dtype: DtypeName, *, shard_bytes: int = 10**9) -> int:
    """Writes the checkpoint and returns the bytes of its tensors."""
    stored_format = uniform_format(config, dtype)
    folder.mkdir(parents=True)
    specs = list(stored_format.specs(config))
    shards = split_into_shards(specs, shard_bytes)
    for number, (name, shard) in enumerate(shards.items()):
        write_safetensors(folder / name, shard, _values(shard, number))
    index = {"weight_map": {spec.name: name for name, shard in shards.items() for spec in shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    values = to_published(config, dtype=stored_format.torch_dtype, quantization=stored_format.quantization)
    (folder / "config.json").write_text(json.dumps(values))
    return sum(spec.nbytes for spec in specs)


def _values(specs: list[TensorSpec], seed: int) -> Iterator[np.ndarray]:
    """Yields random bits with the exponents of small weights; the copies of embedding and head equal the originals."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 2**16, 2**22).astype(np.uint16)
    for spec in specs:
        dtype, count = DTYPES[spec.dtype], math.prod(spec.shape)
        if spec.dtype == "BF16":
            shared = "embed_tokens" in spec.name or "head" in spec.name
            source = np.arange(2**16, dtype=np.uint16) if shared else noise
            flat = (np.resize(source, count) & 0x80FF | 0x3C00).view(dtype)
        elif spec.dtype == "F8_E4M3":
            flat = (np.resize(noise, count).astype(np.uint8) & 0xF7).view(dtype)
        else:
            flat = (1 + np.resize(noise, count) / 2**16).astype(dtype) * dtype.type(0.01)
        yield flat.reshape(spec.shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder to create")
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the checkpoint")
    parser.add_argument("--dtype", choices=list(_BYTES), default="bfloat16")
    arguments = parser.parse_args()
    size = write(arguments.folder, architecture(arguments.gigabytes, arguments.dtype), arguments.dtype)
    print(f"{arguments.folder}: {size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
