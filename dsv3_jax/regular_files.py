"""Opens files that come from elsewhere. Only regular files are opened: a pipe would hang, a device may never end."""

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


_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
