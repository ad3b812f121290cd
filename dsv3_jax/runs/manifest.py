"""SHA-256 digests of a checkpoint's files.

The array store notices truncation, but loads a flipped bit as silently wrong numbers; the digests notice both.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

NAME = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Digests every file below `folder` and writes the list into it, everything flushed to disk."""
    digests = {}
    for path in _files(folder):
        digests[str(path.relative_to(folder))] = _digest(path)
        _flush(path)
    target = folder / NAME
    target.write_text(json.dumps({"sha256": digests}, indent=1, sort_keys=True))
    _flush(target)


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file; None when every file is what was written."""
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
    return f"{extra[0]} does not belong there" if extra else None


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
