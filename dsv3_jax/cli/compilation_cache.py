"""A cache of compiled programs on disk, so that resuming a run or generating text with it starts quickly."""

from __future__ import annotations

import os
from pathlib import Path

import jax

from dsv3_jax.default_device import default_device


def keep_compiled_programs() -> None:
    """Turns on JAX's compilation cache in the user's cache folder.

    Does nothing where a cache is configured already or the folder cannot be made.

    Raises:
      UserError: JAX finds no device to compile for.
    """
    default_device()
    if jax.config.jax_compilation_cache_dir:
        return
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "dsv3_jax" / f"jax-{jax.__version__}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
