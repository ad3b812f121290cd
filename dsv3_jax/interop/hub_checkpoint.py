"""Published checkpoints by their name on the Hugging Face hub, through that library's own cache and tokens."""

from __future__ import annotations

import re
from pathlib import Path

from dsv3_jax.errors import UserError, reason_of

_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_SMALL = ("*.json", "*.jinja", "*.model")
_WEIGHTS = ("*.safetensors",)


def checkpoint_path(source: str, *, weights: bool = True) -> Path:
    """Returns the folder of a checkpoint: a folder that exists, or else OWNER/NAME[@REVISION] fetched from the hub.

    Args:
      weights: fetch the weights too, not only the files that describe them.

    Raises:
      UserError: there is no such folder, `huggingface_hub` is not installed, or the checkpoint cannot be fetched.
    """
    folder = Path(source).expanduser()
    match = _NAME.fullmatch(source)
    if folder.exists() or match is None:
        return folder
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(
            f"{source}: no such folder; to fetch it from the hub, install huggingface_hub: pip install 'dsv3-jax[hf]'"
        ) from error
    try:
        path = huggingface_hub.snapshot_download(
            match["name"], revision=match["revision"], allow_patterns=[*_SMALL, *(_WEIGHTS if weights else ())]
        )
    except Exception as error:  # errors of the network have many classes
        raise UserError(f"{source}: no such folder, and the hub does not give it: {reason_of(error)}") from error
    return Path(path)
