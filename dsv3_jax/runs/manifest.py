"""The manifest of a checkpoint: the SHA-256 of each of its files.

Orbax notices a file that is cut short, but loads a flipped bit as a wrong number. The digests detect both.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from dsv3_jax.bounded_json import read_object
from dsv3_jax.errors import UserError

NAME = "manifest.json"
_LARGEST_MANIFEST = 200_000_000  # bytes, of a checkpoint of about a million files


def write_manifest(folder: Path) -> None:
    """Writes the SHA-256 of every file below `folder` into `folder`/manifest.json, and flushes all files to disk."""
    digests = {}
    for path in _files(folder):
        digests[str(path.relative_to(folder))] = _digest(path)
        _flush(path)
    target = folder / NAME
    target.write_text(json.dumps({"sha256": digests}, indent=1, sort_keys=True), encoding="utf-8")
    _flush(target)


def find_damage(folder: Path) -> str | None:
    """Returns what is wrong with a checkpoint, naming the file, or None where every file is as it was written.

    A file that cannot be read, for whatever reason, is damage.
    """
    try:
        return _find_damage(folder)
    except OSError as error:
        return f"its files cannot be listed ({error.strerror})"


def file_stamps(folder: Path) -> tuple[tuple[str, int, int], ...] | None:
    """Returns name, size and time of change of every file below `folder`; None where they cannot be read."""
    try:
        return tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in _files(folder))
    except OSError:
        return None


def _find_damage(folder: Path) -> str | None:
    if not (folder / NAME).is_file():
        return f"{NAME} is missing"
    try:
        digests = read_object(folder / NAME, max_bytes=_LARGEST_MANIFEST).get("sha256")
    except UserError:
        return f"{NAME} is damaged"
    if not isinstance(digests, dict) or not digests:
        return f"{NAME} is damaged"
    present = {str(path.relative_to(folder)) for path in _files(folder)}
    for name, digest in digests.items():
        if name not in present:
            return f"{name} is missing"
        try:
            if _digest(folder / name) != digest:
                return f"{name} is damaged"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    extra = sorted(present - digests.keys())
    return f"{extra[0]} is not part of the checkpoint" if extra else None


def _files(folder: Path) -> list[Path]:
    """Returns all files below `folder` except the manifest."""
    return sorted(path for path in folder.rglob("*") if path != folder / NAME and path.is_file())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
