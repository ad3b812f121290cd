"""The tokenizer that goes with a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

from dsv3_jax.data import Tokenizer
from dsv3_jax.errors import UserError
from dsv3_jax.interop.checkpoint_folder import checked_file, checked_folder

TOKENIZER_NAME = "tokenizer.json"
# Settings of other tools, carried along unread.
_COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
_MAX_COMPANION_BYTES = 10_000_000


@dataclasses.dataclass(frozen=True)
class TokenIds:
    """Ids of begin and end, where known."""

    bos: int | None = None
    eos: int | None = None


def read_tokenizer(source: str | Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a folder, or a tokenizer.json itself, checked to fit a model.

    Raises:
      UserError: none there, not a tokenizer, or ids beyond the model's vocabulary.
    """
    path = Path(source)
    if path.is_dir():
        path = checked_file(checked_folder(path), TOKENIZER_NAME)
    tokenizer = Tokenizer.load(path)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"{path}: has {tokenizer.vocab_size:,} ids, but the model's vocabulary is {vocab_size:,}")
    return tokenizer


def write_tokenizer(source: str | Path | None, folder: Path, vocab_size: int) -> TokenIds:
    """Copies a tokenizer and its companions into `folder`; what a companion lacks is written from the tokenizer."""
    if source is None:
        return TokenIds()
    tokenizer = read_tokenizer(source, vocab_size)
    path = Path(source)
    origin = path if path.is_dir() else path.parent
    shutil.copyfile(origin / TOKENIZER_NAME if path.is_dir() else path, folder / TOKENIZER_NAME)
    if path.is_dir():
        for name in _COMPANIONS:
            if (origin / name).exists():
                companion = checked_file(origin.resolve(), name)
                if companion.stat().st_size > _MAX_COMPANION_BYTES:
                    raise UserError(f"{companion}: larger than {_MAX_COMPANION_BYTES:,} bytes; not a settings file")
                shutil.copyfile(companion, folder / name)
    if not (folder / "tokenizer_config.json").exists():
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": _name(tokenizer, tokenizer.bos_id),
            "eos_token": _name(tokenizer, tokenizer.eos_id),
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return TokenIds(tokenizer.bos_id, tokenizer.eos_id)


def _name(tokenizer: Tokenizer, index: int) -> str:
    return tokenizer.to_bytes([index]).decode("utf-8")
