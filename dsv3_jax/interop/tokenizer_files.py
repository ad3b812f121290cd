"""Reads and writes the tokenizer files of a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

from dsv3_jax.data import Tokenizer
from dsv3_jax.errors import UserError
from dsv3_jax.interop.checkpoint_folder import checked_file, checked_folder

TOKENIZER_NAME = "tokenizer.json"
# Settings of other programs, which are copied without being read.
_COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
_MAX_COMPANION_BYTES = 10_000_000


@dataclasses.dataclass(frozen=True)
class TokenIds:
    """The ids of the tokens that begin and end a text, where they are known."""

    bos: int | None = None
    eos: int | None = None


def read_tokenizer(source: str | Path, vocab_size: int) -> Tokenizer:
    """Returns the tokenizer of a folder, or of a tokenizer.json, after checking that it fits the model.

    Raises:
      UserError: there is no tokenizer, the file is not one, or it has more ids than the model's vocabulary.
    """
    path = Path(source)
    if path.is_dir():
        path = checked_file(checked_folder(path), TOKENIZER_NAME)
    tokenizer = Tokenizer.load(path)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"{path}: has {tokenizer.vocab_size:,} ids, but the model's vocabulary is {vocab_size:,}")
    return tokenizer


def write_tokenizer(source: str | Path | None, folder: Path, vocab_size: int) -> TokenIds:
    """Copies a tokenizer and its settings files into `folder`, and returns its special ids.

    Where tokenizer_config.json is missing, it is written with the tokenizer's begin and end tokens.
    """
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
