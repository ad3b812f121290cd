"""Opens a checkpoint in the published layout: its configuration, and its tensors under their published names.

Checkpoints saved with the names that transformers 5 has in memory store all experts of a layer in two tensors,
mlp.experts.gate_up_proj [E, 2I, d] (gate first) and mlp.experts.down_proj [E, d, I]. The rows of an expert follow one
another there, so that each part can be read as the tensor that it is in the published layout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from dsv3_jax.errors import UserError
from dsv3_jax.interop.checkpoint_folder import CheckpointFolder, open_checkpoint
from dsv3_jax.interop.hf_config import PublishedConfig, read_config
from dsv3_jax.interop.safetensors_reader import DTYPES, TensorEntry
from dsv3_jax.interop.tensor_names import SCALE_SUFFIX

_GATE_UP, _DOWN = ".mlp.experts.gate_up_proj", ".mlp.experts.down_proj"


def open_published(folder: Path | str, *, headers: bool = True) -> tuple[CheckpointFolder, PublishedConfig]:
    """Returns the tensors of a checkpoint by their published names, and its configuration.

    Args:
      folder: the checkpoint.
      headers: if False, the files of the weights may all be absent (see `open_checkpoint`).

    Raises:
      UserError: a file is missing or wrong.
    """
    checkpoint = open_checkpoint(folder, headers=headers)
    published = read_config(checkpoint.path)
    return separate_experts(checkpoint, published.model.n_routed_experts), published


def separate_experts(checkpoint: CheckpointFolder, experts: int) -> CheckpointFolder:
    """Returns the checkpoint with the tensors of all experts of a layer taken apart into those of each expert."""
    if not any(name.removesuffix(SCALE_SUFFIX).endswith((_GATE_UP, _DOWN)) for name in checkpoint.names):
        return checkpoint
    if checkpoint.entries is None:
        names = (part for name in checkpoint.names for part in _names(name, experts))
        return dataclasses.replace(checkpoint, names=frozenset(names))
    entries = {part.name: part for entry in checkpoint.entries.values() for part in _parts(entry, experts)}
    return dataclasses.replace(checkpoint, names=frozenset(entries), entries=entries)


def _names(name: str, experts: int) -> Iterator[str]:
    """Yields the published names of the parts of a tensor, in the order in which they are stored."""
    plain = name.removesuffix(SCALE_SUFFIX)
    suffix = ".weight" + name[len(plain) :]
    if plain.endswith(_GATE_UP):
        one = plain.removesuffix("gate_up_proj")
        yield from (f"{one}{expert}.{half}_proj{suffix}" for expert in range(experts) for half in ("gate", "up"))
    elif plain.endswith(_DOWN):
        one = plain.removesuffix("down_proj")
        yield from (f"{one}{expert}.down_proj{suffix}" for expert in range(experts))
    else:
        yield name


def _parts(entry: TensorEntry, experts: int) -> Iterator[TensorEntry]:
    names = list(_names(entry.name, experts))
    if names == [entry.name]:
        yield entry
        return
    if len(entry.shape) != 3 or entry.shape[0] != experts or entry.shape[0] * entry.shape[1] % len(names):
        raise UserError(
            f"{entry.path}: tensor '{entry.name}' has shape {list(entry.shape)}; expected [{experts}, rows, columns], "
            "the rows of the gate before those of the up projection"
        )
    rows, columns = entry.shape[0] * entry.shape[1] // len(names), entry.shape[2]
    size = rows * columns * DTYPES[entry.dtype].itemsize
    for index, name in enumerate(names):
        yield TensorEntry(name, entry.dtype, (rows, columns), entry.start + index * size, entry.path)
