"""Writes a folder so that it appears complete or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dsv3_jax.errors import UserError, reason_of


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yields a hidden folder to write to, which is renamed to `target` when the block ends without error.

    An error removes the hidden folder. A killed process leaves it; its name says that it is unfinished.

    Raises:
      UserError: the target exists already, or cannot be written.
    """
    if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
        raise UserError(f"{target}: is there already; choose a new folder")
    final = target.absolute()
    temporary = None
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.unfinished-", dir=final.parent))
        yield temporary
        temporary.chmod(0o755)
        os.rename(temporary, final)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({reason_of(error)}); nothing is left there") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
