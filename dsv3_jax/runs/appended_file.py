"""A file to which whole records are appended."""

from __future__ import annotations

import os
from pathlib import Path

from dsv3_jax.runs.folder import writing


class AppendedFile:
    """A file to which whole records are appended, without a buffer.

    Each record is in the hands of the operating system when `write` returns, so that it survives a killed process. A
    buffer that could not be written to a full disk would be tried again, and fail again, when Python closes the file.

    Args:
      path: the file, which is made where it does not exist.

    Raises:
      UserError: the file cannot be written; so do the methods.
    """

    def __init__(self, path: Path):
        self._path = path
        with writing(path):
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def write(self, record: bytes) -> None:
        """Appends a record. Where the file was deleted meanwhile, it is made again."""
        with writing(self._path):
            if not os.fstat(self._descriptor).st_nlink:
                os.close(self._descriptor)
                self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            while record:
                record = record[os.write(self._descriptor, record) :]

    def flush(self) -> None:
        """Waits until everything is on the disk."""
        with writing(self._path):
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)
