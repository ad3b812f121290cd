"""Calculates what devices keep and hosts read when a published checkpoint is loaded on a mesh, without its files.

    python experiments/benchmarks/checkpoint_on_mesh.py [--preset v3-671b] [--mesh stage=16,expert=64,data=2]

Uses the list of tensors of the published FP8 checkpoint, the shardings of the model on that mesh, and the pieces that
`load_hf` would read; no array is made. Writes checkpoint_on_mesh.json into experiments/results/: the shape of each
parameter's shard and its bytes in float32, and the bytes that the hosts read. A host reads whole rows of a tensor, also
where its devices keep only part of their columns.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh

from dsv3_jax.config import ModelConfig
from dsv3_jax.interop.account import take_account
from dsv3_jax.interop.checkpoint_folder import CheckpointFolder
from dsv3_jax.interop.file_pieces import Box, pieces
from dsv3_jax.interop.hf_config import PublishedConfig, Quantization
from dsv3_jax.interop.importer import stored_tensors
from dsv3_jax.interop.parameter_tree import arrays, shardings
from dsv3_jax.interop.safetensors_reader import TensorEntry
from dsv3_jax.interop.stored_format import uniform_format
from dsv3_jax.interop.stored_tensor import StoredTensor
from dsv3_jax.interop.streaming import PIECE_BYTES
from dsv3_jax.model import abstract_model
from dsv3_jax.pipeline.slots import moe_layers_of_stages
from dsv3_jax.sharding.mesh import AXES, MeshConfig
from dsv3_jax.sharding.on_mesh import OnMesh

RESULTS = Path(__file__).resolve().parents[1] / "results"
DEVICES_PER_HOST = 8


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter of a model on a mesh.

    Attributes:
      shape: of the whole parameter.
      spec: the mesh axes over which each dimension is sharded, outermost first.
      tensors: the tensors that fill it.
    """

    shape: tuple[int, ...]
    spec: tuple[tuple[str, ...], ...]
    tensors: list[StoredTensor]

    def shard(self, sizes: dict[str, int], at: dict[str, int]) -> Box:
        """Returns the part that the device at coordinates `at` of a mesh of `sizes` keeps."""
        box = []
        for size, axes in zip(self.shape, self.spec, strict=True):
            number, width = 0, size // math.prod(sizes[axis] for axis in axes)
            for axis in axes:
                number = number * sizes[axis] + at[axis]
            box.append((number * width, (number + 1) * width))
        return tuple(box)


def parameters_on_mesh(config: ModelConfig, mesh: MeshConfig) -> dict[str, Parameter]:
    """Returns the parameters of a model on a mesh by path, with the tensors of its published FP8 checkpoint."""
    sizes = mesh.sizes
    abstract = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    devices = OnMesh(abstract, moe_layers_of_stages(config, mesh.stage))  # pyright: ignore[reportArgumentType]
    model = abstract_model(config, devices=devices)
    specs = uniform_format(config, "fp8").specs(config)
    entries = {spec.name: TensorEntry(spec.name, spec.dtype, spec.shape, 0, Path("absent")) for spec in specs}
    checkpoint = CheckpointFolder(Path("absent"), frozenset(entries), entries)
    published = PublishedConfig(config, Quantization())
    stored = stored_tensors(checkpoint, published, take_account(checkpoint, published).consumed)
    kept_at = shardings(model)
    result = {}
    for path, array in arrays(model).items():
        spec = [(axes,) if isinstance(axes, str) else tuple(axes or ()) for axes in kept_at[path].spec]  # pyright: ignore
        spec += [()] * (array.ndim - len(spec))
        result[path] = Parameter(array.shape, tuple(spec), stored[path])
    return result


def hosts(mesh: MeshConfig) -> Iterator[list[dict[str, int]]]:
    """Yields the coordinates of each host's devices: neighbours on the innermost axes share a host."""
    coordinates = np.ndindex(*mesh.sizes.values())
    for group in itertools.batched(coordinates, DEVICES_PER_HOST):
        yield [{axis: int(at) for axis, at in zip(AXES, device, strict=True)} for device in group]


def check_shards(parameter: Parameter, mesh: MeshConfig) -> int:
    """Returns a device's bytes in float32, after checking that the shards of all devices tile the parameter."""
    sizes = mesh.sizes
    used = [axis for axes in parameter.spec for axis in axes]
    places = [dict.fromkeys(AXES, 0) | dict(zip(used, at, strict=True)) for at in np.ndindex(*(sizes[a] for a in used))]
    boxes = {parameter.shard(sizes, at) for at in places}
    elements = [math.prod(last - first for first, last in box) for box in boxes]
    assert len(boxes) == len(places), parameter
    assert sum(elements) == math.prod(parameter.shape), parameter
    return 4 * elements[0]


def bytes_read(parameter: Parameter, boxes: frozenset[Box]) -> int:
    """Returns the bytes that a host reads for its shards, after checking that every element of them is filled once."""
    read = filled = 0
    for piece in pieces(parameter.tensors, boxes, PIECE_BYTES):
        read += piece.nbytes
        for box in piece.shards:
            filled += math.prod(last - first for first, last in piece.target(box))
    assert filled == sum(math.prod(last - first for first, last in box) for box in boxes), parameter
    return read


def account(config: ModelConfig, mesh: MeshConfig) -> dict[str, Any]:
    """Returns the result of this benchmark."""
    sizes, parameters = mesh.sizes, parameters_on_mesh(config, mesh)
    table, per_host = {}, np.zeros(math.prod(sizes.values()) // DEVICES_PER_HOST, np.int64)
    for path, parameter in parameters.items():
        per_device = check_shards(parameter, mesh)
        shard = parameter.shard(sizes, dict.fromkeys(AXES, 0))
        table[path] = {
            "shape": list(parameter.shape),
            "shard": [last - first for first, last in shard],
            "sharded_over": [list(axes) for axes in parameter.spec],
            "bytes_per_device": per_device,
        }
        known: dict[frozenset[Box], int] = {}
        for number, devices in enumerate(hosts(mesh)):
            boxes = frozenset(parameter.shard(sizes, at) for at in devices)
            if boxes not in known:
                known[boxes] = bytes_read(parameter, boxes)
            per_host[number] += known[boxes]
    file_bytes = sum(tensor.nbytes for parameter in parameters.values() for tensor in parameter.tensors)
    total = sum(math.prod(parameter.shape) for parameter in parameters.values())
    assert total == config.num_parameters(mtp=True)
    # Every byte is read by some host, since the shards of all hosts tile every parameter.
    assert per_host.sum() >= file_bytes
    return {
        "mesh": mesh.written,
        "hosts": len(per_host),
        "devices_per_host": DEVICES_PER_HOST,
        "parameters": total,
        "file_bytes": file_bytes,
        "bytes_per_device": sum(row["bytes_per_device"] for row in table.values()),
        "bytes_read_per_host": {"least": int(per_host.min()), "most": int(per_host.max())},
        "bytes_read_by_all_hosts": int(per_host.sum()),
        "table": table,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="v3-671b")
    parser.add_argument("--mesh", type=MeshConfig.parse, default=MeshConfig(stage=16, expert=64, data=2))
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    result = {"preset": arguments.preset} | account(ModelConfig.preset(arguments.preset), arguments.mesh)
    for path, row in result["table"].items():
        print(
            f"{path:52s} {row['shape']!s:26s} {row['shard']!s:24s} {row['bytes_per_device'] / 1e6:9.2f} MB per device"
        )
    read = result["bytes_read_per_host"]
    print(
        f"{result['bytes_per_device'] / 1e9:.2f} GB of float32 parameters per device; each of {result['hosts']} hosts "
        f"reads {read['least'] / 1e9:.1f} to {read['most'] / 1e9:.1f} GB of {result['file_bytes'] / 1e9:.1f} GB"
    )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "checkpoint_on_mesh.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
