"""Text to ids and back, from any tokenizer.json whose tokens stand for bytes."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int32

from dsv3_jax.data import control_tokens as control
from dsv3_jax.data.token_bytes import bytes_of_tokens
from dsv3_jax.errors import UserError

FILE_NAME = "tokenizer.json"
LARGEST_FILE = 256 * 2**20  # bytes, unpacked
MOST_UNUSED_IDS = 2**16  # below the largest id: some published vocabularies leave gaps
_PROBE = "def f(x):\n\treturn  'Ünïcode 漢字 1234'  # ok\r\n\n"


class Tokenizer:
    """A tokenizer.json, checked.

    `encode` takes its argument as text and nothing else: "<think>" in a document becomes the ids of seven characters,
    never the control token. Control tokens are reached by their ids (`bos_id`, `control_id`), or with
    `encode(text, control_tokens=True)`.

    Attributes:
      vocab_size: ids are below this; a few of them may stand for nothing.
      token_bytes: int32 [vocab_size]; bytes of text each id stands for, 0 for control tokens, so that summed over
        `encode(text)` they give the length of the text in UTF-8.
      bos_id, eos_id: begin and end of a text (bos_id is eos_id where there is no own one).
      pad_id: padding (eos_id where there is no own one).
      fim_begin_id, fim_hole_id, fim_end_id, user_id, assistant_id, think_id, end_think_id: None where absent.
      fingerprint: SHA-256 of the definition; equal for equal tokenizers however the file is laid out.
    """

    vocab_size: int
    token_bytes: Int32[np.ndarray, " V"]

    def __init__(self, definition: str, source: str = "the tokenizer") -> None:
        """Args: definition: the text of a tokenizer.json. source: its name in error messages.

        Raises:
          UserError: not a usable tokenizer; one line that names `source`.
        """
        self._source = source
        self._definition = _parse(definition, source)
        self.fingerprint = hashlib.sha256(json.dumps(self._definition, sort_keys=True).encode()).hexdigest()
        with rust_errors(f"{source} is not a usable tokenizer.json"):
            self._text_encoder = _build(self._definition)
            self._text_encoder.encode_special_tokens = True
            vocabulary = self._text_encoder.get_vocab(with_added_tokens=True)
        self._ids = vocabulary
        self.vocab_size = _checked_size(vocabulary, self._definition, source)
        self._bytes = bytes_of_tokens(vocabulary, self.vocab_size, self._definition, source)
        special = [token["id"] for token in self._definition["added_tokens"] if _is_control(token)]
        self.token_bytes = np.array([len(part) for part in self._bytes], np.int32)
        self.token_bytes[special] = 0
        self.eos_id = self._require(control.END_NAMES)
        self.bos_id = next((vocabulary[name] for name in control.BEGIN_NAMES if name in vocabulary), self.eos_id)
        self.pad_id = vocabulary.get(control.PADDING, self.eos_id)
        self.fim_begin_id = self.control_id(control.FIM_BEGIN)
        self.fim_hole_id = self.control_id(control.FIM_HOLE)
        self.fim_end_id = self.control_id(control.FIM_END)
        self.user_id = self.control_id(control.USER)
        self.assistant_id = self.control_id(control.ASSISTANT)
        self.think_id = self.control_id(control.THINK)
        self.end_think_id = self.control_id(control.END_THINK)
        self._probe()

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """From a tokenizer.json, a gzipped one, or a folder that holds either.

        Raises:
          UserError: absent, unreadable or not a usable tokenizer.
        """
        file = Path(path)
        if file.is_dir():
            names = [file / FILE_NAME, file / f"{FILE_NAME}.gz"]
            file = next((name for name in names if name.exists()), names[0])
        return cls(_read_text(file), str(file))

    def save(self, folder: str | Path) -> None:
        """Writes `folder`/tokenizer.json, whole or not at all."""
        target = Path(folder) / FILE_NAME
        temporary = target.with_name(f".{FILE_NAME}.{os.getpid()}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self._definition, ensure_ascii=False), encoding="utf-8")
            temporary.replace(target)
        except OSError as error:
            raise UserError(f"cannot write the tokenizer to {target}: {error.strerror}") from error

    def encode(self, text: str, *, control_tokens: bool = False) -> list[int]:
        """The ids of a text, without begin and end.

        Args:
          control_tokens: the names of control tokens in `text` become their ids; only for text of one's own making.

        Raises:
          UserError: the text holds a lone surrogate (it has no UTF-8), or the tokenizer fails on it.
        """
        _check_utf8(text)
        encoder = self._control_encoder if control_tokens else self._text_encoder
        with rust_errors(f"{self._source} fails on a text of {len(text)} characters"):
            return encoder.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of several texts, on all cores."""
        for text in texts:
            _check_utf8(text)
        with rust_errors(f"{self._source} fails on the corpus"):
            encodings = self._text_encoder.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def to_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """What ids stand for; control tokens as their names, ids beyond the vocabulary (spare rows) as nothing."""
        size = self.vocab_size
        return b"".join(self._bytes[index] for index in map(int, ids) if 0 <= index < size)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of ids; bytes that are not UTF-8 (a character cut in two) as U+FFFD."""
        return self.to_bytes(ids).decode("utf-8", errors="replace")

    def control_id(self, name: str) -> int | None:
        """The id of a control token by its name, None where absent."""
        return self._ids.get(name)

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[str, str]]:
        # Made anew from the definition: the library's own pickle forgets that control tokens are not read from text.
        return Tokenizer, (json.dumps(self._definition), self._source)

    @cached_property
    def _control_encoder(self) -> tokenizers.Tokenizer:
        return _build(self._definition)

    def _require(self, names: Sequence[str]) -> int:
        found = next((self._ids[name] for name in names if name in self._ids), None)
        if found is None:
            raise UserError(f"{self._source} has no end-of-text token: add one of {', '.join(names)}")
        return found

    def _probe(self) -> None:
        """Encodes and decodes a line: catches patterns that crash, ids out of range and tokenizers that lose text."""
        ids = self.encode(_PROBE)
        if any(index >= self.vocab_size for index in ids):
            raise UserError(f"{self._source} encodes text to ids beyond its vocabulary of {self.vocab_size}")
        text = self.decode(ids)
        if text not in (_PROBE, " " + _PROBE):  # a leading space is what SentencePiece conversions add
            raise UserError(f"{self._source} does not give back the text it encodes: give a byte-level tokenizer")


@contextmanager
def rust_errors(what: str) -> Iterator[None]:
    """Turns whatever the tokenizers library throws into one line; a Rust panic is a BaseException, not an Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, UserError):
        raise
    except BaseException as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{what}: {reason or type(error).__name__}") from error


def _check_utf8(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"character {error.start} of the text is a lone surrogate, which has no UTF-8 form") from None


def _read_text(file: Path) -> str:
    try:
        opener = gzip.open if file.suffix == ".gz" else open
        with opener(file, "rb") as stream:
            raw = stream.read(LARGEST_FILE + 1)
    except (OSError, EOFError) as error:
        raise UserError(f"cannot read the tokenizer {file}: {getattr(error, 'strerror', None) or error}") from error
    if len(raw) > LARGEST_FILE:
        raise UserError(
            f"the tokenizer {file} is larger than {LARGEST_FILE // 2**20} MiB unpacked: not a tokenizer.json"
        )
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"the tokenizer {file} is not UTF-8 at byte {error.start}") from None


def _parse(definition: str, source: str) -> dict[str, Any]:
    try:
        parsed = json.loads(definition)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} is not JSON: {' '.join(str(error).split())}") from error
    if not isinstance(parsed, dict) or not isinstance(parsed.get("model"), dict):
        raise UserError(f"{source} is not a tokenizer.json: it has no object 'model'")
    parsed = {**parsed, "added_tokens": parsed.get("added_tokens") or []}
    added = parsed["added_tokens"]
    if not isinstance(added, list) or not all(
        isinstance(token, dict) and isinstance(token.get("id"), int) and isinstance(token.get("content"), str)
        for token in added
    ):
        raise UserError(f"{source} is not a usable tokenizer.json: each of 'added_tokens' needs an id and a content")
    return parsed


def _build(definition: dict[str, Any]) -> tokenizers.Tokenizer:
    """The library's tokenizer with every control token marked as such, and nothing cut, padded or added."""
    added = [{**token, "special": _is_control(token)} for token in definition["added_tokens"]]
    plain = {**definition, "added_tokens": added, "truncation": None, "padding": None, "post_processor": None}
    return tokenizers.Tokenizer.from_str(json.dumps(plain))


def _is_control(token: dict[str, Any]) -> bool:
    """Published tokenizers mark some control tokens (fill-in-middle, turns) as ordinary: told by their names."""
    return bool(token.get("special")) or token["content"].startswith("<")


def _checked_size(vocabulary: dict[str, int], definition: dict[str, Any], source: str) -> int:
    declared = {token["content"]: token["id"] for token in definition["added_tokens"]}
    for token, index in (*vocabulary.items(), *declared.items()):
        if not 0 <= index < len(vocabulary) + MOST_UNUSED_IDS:
            raise UserError(f"{source}: token {token!r} has id {index}, far beyond its vocabulary of {len(vocabulary)}")
    for token, index in declared.items():
        if vocabulary.get(token) != index:
            raise UserError(f"{source}: added token {token!r} says id {index} but gets {vocabulary.get(token)}")
    return max(vocabulary.values(), default=-1) + 1
