"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dsv3_jax.errors import UserError


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target` to write into; it takes the target's name when the block ends without error.

    An error removes it. A killed process leaves the hidden folder, whose name says that it is unfinished.

    Raises:
      UserError: the target is there already, or cannot be written.
    """
    if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
        raise UserError(f"{target}: is there already; choose a new folder")
    place = target.absolute()
    temporary = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{place.name}.unfinished-", dir=place.parent))
        yield temporary
        temporary.chmod(0o755)
        os.rename(temporary, place)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror}); nothing is left there") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
