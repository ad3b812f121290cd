"""The manifest of a checkpoint: the SHA-256 of each of its files.

Orbax notices a file that is cut short, but loads a flipped bit as a wrong number. The digests detect both.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

NAME = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Writes the SHA-256 of every file below `folder` into `folder`/manifest.json, and flushes all files to disk."""
    digests = {}
    for path in _files(folder):
        digests[str(path.relative_to(folder))] = _digest(path)
        _flush(path)
    target = folder / NAME
    target.write_text(json.dumps({"sha256": digests}, indent=1, sort_keys=True))
    _flush(target)


def find_damage(folder: Path) -> str | None:
    """Returns what is wrong with a checkpoint, naming the file, or None where every file is as it was written."""
    try:
        digests = json.loads((folder / NAME).read_text())["sha256"]
    except FileNotFoundError:
        return f"{NAME} is missing"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{NAME} is damaged"
    if not isinstance(digests, dict) or not digests:
        return f"{NAME} is damaged"
    present = {str(path.relative_to(folder)) for path in _files(folder)} - {NAME}
    for name, digest in digests.items():
        if name not in present:
            return f"{name} is missing"
        if _digest(folder / name) != digest:
            return f"{name} is damaged"
    extra = sorted(present - digests.keys())
    return f"{extra[0]} is not part of the checkpoint" if extra else None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
