"""Reads and writes the tokenizer files of a checkpoint."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from dsv3_jax.bounded_json import parse_object
from dsv3_jax.data import Tokenizer
from dsv3_jax.data.tokenizer_settings import MODEL_TOKENS, TOKENIZER_CONFIG
from dsv3_jax.errors import UserError

TOKENIZER_NAME = "tokenizer.json"


def read_tokenizer(source: str | Path, vocab_size: int) -> Tokenizer:
    """Returns the tokenizer of a folder, or of a tokenizer.json, after checking that it fits the model.

    Raises:
      UserError: there is no tokenizer, the file is not one, or it has more ids than the model's vocabulary.

    Warns:
      UserWarning: it has less than half as many ids as the model, so that it hardly belongs to it.
    """
    tokenizer = Tokenizer.load(source)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"{source}: has {tokenizer.vocab_size:,} ids, but the model's vocabulary is {vocab_size:,}")
    if 2 * tokenizer.vocab_size < vocab_size:
        warnings.warn(
            f"{source}: has {tokenizer.vocab_size:,} ids, but the model's vocabulary is {vocab_size:,}: it is probably "
            "not the tokenizer of these weights",
            stacklevel=2,
        )
    return tokenizer


def write_tokenizer(source: Tokenizer | str | Path | None, folder: Path, vocab_size: int) -> dict[str, Any]:
    """Writes a tokenizer and the files beside it into `folder`.

    Where tokenizer_config.json is missing, it is written with the tokenizer's begin and end tokens.

    Args:
      source: a tokenizer, the file of one, or a folder with one and its settings; None writes nothing.
      vocab_size: size of the model's vocabulary.

    Returns:
      The fields of config.json that name token ids.
    """
    if source is None:
        return {"bos_token_id": None, "eos_token_id": None}
    tokenizer = source if isinstance(source, Tokenizer) else read_tokenizer(source, vocab_size)
    tokenizer.save(folder)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    if MODEL_TOKENS in tokenizer.companions:
        ids |= parse_object(tokenizer.companions[MODEL_TOKENS].encode(), MODEL_TOKENS)
        (folder / MODEL_TOKENS).unlink()
    if TOKENIZER_CONFIG not in tokenizer.companions:
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": _name(tokenizer, tokenizer.bos_id),
            "eos_token": _name(tokenizer, tokenizer.eos_id),
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
        }
        (folder / TOKENIZER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return ids


def _name(tokenizer: Tokenizer, index: int) -> str:
    return tokenizer.to_bytes([index]).decode("utf-8")
