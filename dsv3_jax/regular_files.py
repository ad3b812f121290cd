"""Opens files that come from elsewhere: regular files only, and of a folder only those that are really in it.

A pipe would hang, a device may never end, and a link could give out a file that the folder's author cannot read.
"""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path

from dsv3_jax.errors import UserError


def open_regular(path: Path | str) -> io.BufferedReader:
    """Opens a file for reading bytes.

    Raises:
      UserError: it is missing, cannot be read, or is no regular file (nor a link to one).
    """
    try:
        # Without O_NONBLOCK, opening a pipe would wait until something writes to it.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    kind = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(kind):
        os.close(descriptor)
        raise UserError(f"cannot read {path}: it is {_KINDS.get(stat.S_IFMT(kind), 'not a regular file')}")
    return open(descriptor, "rb")


def read_regular(path: Path | str, *, max_bytes: int) -> bytes:
    """Returns the content of a file; see `open_regular`. A file of more than `max_bytes` is refused."""
    with open_regular(path) as file:
        try:
            data = file.read(max_bytes + 1)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
    if len(data) > max_bytes:
        raise UserError(f"cannot read {path}: it is larger than {max_bytes:,} bytes")
    return data


def check_regular(path: Path | str) -> None:
    """Raises UserError where `open_regular` would; for libraries that open the file themselves."""
    open_regular(path).close()


def checked_folder(folder: Path | str) -> Path:
    """Returns `folder` with links resolved.

    Raises:
      UserError: there is no such folder.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"{folder}: no such folder")
    return path.resolve()


def checked_file(folder: Path, name: str) -> Path:
    """Returns the path of the file `name` of a resolved folder, with links resolved.

    Raises:
      UserError: the file is missing, not a regular file, or outside the folder.
    """
    path = folder / name
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError):
        raise UserError(f"{path}: is missing") from None
    if folder not in real.parents and not _is_of_download_cache(folder, real):
        raise UserError(f"{path}: is a link that leads out of the folder; copy the file there")
    if not real.is_file():
        raise UserError(f"{path}: is not a regular file")
    return real


def _is_of_download_cache(folder: Path, real: Path) -> bool:
    """Tells whether `real` is where the cache of huggingface_hub keeps the contents of the files in `folder`.

    There snapshots/REVISION/NAME is a link to blobs/DIGEST.
    """
    return folder.parent.name == "snapshots" and real.parent == folder.parent.parent / "blobs"


_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
