"""Finds which file of a folder in the published layout holds which tensor.

Sharded checkpoints have `model.safetensors.index.json`, whose `weight_map` names a file for every tensor. The map is
not trusted: only plain file names inside the folder are accepted, and symbolic links that lead out of the folder are
refused, except those of a download cache to its own files. Files of other formats (pickles) are never opened.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from dsv3_jax.bounded_json import read_object, shown
from dsv3_jax.errors import UserError
from dsv3_jax.interop.safetensors_reader import TensorEntry, read_header
from dsv3_jax.regular_files import checked_file, checked_folder

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_SHARD_NAME = re.compile(r"[A-Za-z0-9._-]+\.safetensors")
_MAX_INDEX_BYTES = 100_000_000
_MAX_NAMED = 5


@dataclasses.dataclass(frozen=True)
class CheckpointFolder:
    """The tensors of a checkpoint.

    Attributes:
      path: the folder.
      names: the name of every tensor, from the index (or from the only file).
      entries: dtype, shape and position of every tensor; None where only the index exists (enough for an account).
      notices: lines that the user should read.
    """

    path: Path
    names: frozenset[str]
    entries: dict[str, TensorEntry] | None
    notices: tuple[str, ...] = ()


def open_checkpoint(folder: Path | str, *, headers: bool = True) -> CheckpointFolder:
    """Returns the tensors of a checkpoint, from its index and the header of every shard; no data is read.

    Args:
      folder: the checkpoint.
      headers: if False, the shards may all be absent; then `entries` is None.

    Raises:
      UserError: there is no checkpoint, a shard is missing, or index and shards disagree.
    """
    folder = checked_folder(folder)
    index, single = folder / INDEX_NAME, folder / SINGLE_NAME
    files = [SINGLE_NAME]
    if index.exists():
        weight_map = _read_index(checked_file(folder, INDEX_NAME))
        files = sorted(set(weight_map.values()))
        if single.exists() and SINGLE_NAME not in files:
            raise UserError(
                f"{folder}: holds two sets of weights, {SINGLE_NAME} and the shards of {INDEX_NAME}, of which "
                "other programs use the first: delete the one that is not wanted"
            )
        if not headers and not any((folder / name).exists() for name in files):
            return CheckpointFolder(folder, frozenset(weight_map), None)
        entries = _read_shards(folder, weight_map, files)
    elif single.exists():
        entries = read_header(checked_file(folder, SINGLE_NAME))
    else:
        raise UserError(f"{folder}: holds neither {INDEX_NAME} nor {SINGLE_NAME}{_pickle_hint(folder)}")
    return CheckpointFolder(folder, frozenset(entries), entries, _unused(folder, files))


def _unused(folder: Path, files: list[str]) -> tuple[str, ...]:
    """Returns a notice of shards that do not belong to the weights that are read, as those of an earlier save."""
    others = sorted(path.name for path in folder.glob("*-of-*.safetensors") if path.name not in files)
    if not others:
        return ()
    more = f" and {len(others) - 1} more" if len(others) > 1 else ""
    return (f"{folder}: {others[0]}{more} is of another set of weights and is not read",)


def _read_index(path: Path) -> dict[str, str]:
    index = read_object(path, max_bytes=_MAX_INDEX_BYTES)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path}: has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _SHARD_NAME.fullmatch(file):
            raise UserError(
                f"{path}: tensor {shown(name)} is listed in {shown(file)}; "
                "expected a plain name that ends in .safetensors"
            )
    return weight_map


def _read_shards(folder: Path, weight_map: dict[str, str], files: list[str]) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    for file in files:
        path = checked_file(folder, file)
        for name, entry in read_header(path).items():
            if name in entries:
                raise UserError(f"{path}: tensor {shown(name)} is also in {entries[name].path.name}")
            if weight_map.get(name) != file:
                said = f"puts it in {weight_map[name]}" if name in weight_map else "does not know it"
                raise UserError(f"{path}: holds tensor {shown(name)}, but {INDEX_NAME} {said}")
            entries[name] = entry
    absent = [name for name in weight_map if name not in entries]
    if absent:
        raise UserError(f"{folder / weight_map[absent[0]]}: lacks {named(absent)}, which {INDEX_NAME} puts there")
    return entries


def named(names: list[str]) -> str:
    """Returns `tensor 'a'` or `3 tensors ('a', 'b', 'c')`, shortened, for a message."""
    if len(names) == 1:
        return f"tensor {shown(names[0])}"
    more = ", ..." if len(names) > _MAX_NAMED else ""
    return f"{len(names):,} tensors ({', '.join(shown(name) for name in names[:_MAX_NAMED])}{more})"


def _pickle_hint(folder: Path) -> str:
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        return "; pickled weights are never opened: convert them to safetensors first"
    return ""
