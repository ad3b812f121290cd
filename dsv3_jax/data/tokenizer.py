"""The tokenizer: text to ids and back, from any tokenizer.json whose tokens stand for bytes."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int32

from dsv3_jax.bounded_json import parse_object
from dsv3_jax.data import control_tokens as control
from dsv3_jax.data.token_bytes import bytes_of_tokens
from dsv3_jax.data.tokenizer_settings import CHAT_TEMPLATE, Companions, read_companions, read_settings
from dsv3_jax.data.tokenizer_trial import try_tokenizer
from dsv3_jax.errors import UserError, reason_of
from dsv3_jax.regular_files import checked_file, open_regular

FILE_NAME = "tokenizer.json"
LARGEST_EXPANSION = 256  # times that a tokenizer's normalizers may lengthen a text
LARGEST_FILE = 256 * 2**20  # bytes, unpacked
MOST_UNUSED_IDS = 2**16  # some published vocabularies have gaps between their ids
_PROBE = "def f(x):\n\treturn  'Ünïcode 漢字 1234'  # ok\r\n\n"


class Tokenizer:
    """A checked tokenizer.json.

    `encode` treats its argument only as text: "<think>" in a document becomes the ids of its characters, never the
    control token. Control tokens are given by their ids (`bos_id`, `control_id`) or by
    `encode(text, control_tokens=True)`.

    Attributes:
      vocab_size: number of ids; a few of them may stand for nothing.
      token_bytes: number of bytes of text that each id stands for, int32 [vocab_size]; 0 for control tokens. Their sum
        over `encode(text)` is the length of the text in UTF-8.
      bos_id: begin of a text; eos_id if the tokenizer has none.
      eos_id: end of a text.
      pad_id: padding; eos_id if the tokenizer has none.
      end_ids: ids that end a continuation: eos_id, and those that the files beside the tokenizer name.
      adds_bos: whether prompts of a published model begin with bos_id.
      control_names: names of the control tokens.
      settings: what the files beside a published tokenizer say.
      companions: those files; `save` writes them too.
      fingerprint: SHA-256 of the definition, which does not depend on the file's formatting.
    """

    vocab_size: int
    token_bytes: Int32[np.ndarray, " V"]

    def __init__(self, definition: str, source: str = "the tokenizer", companions: Companions | None = None) -> None:
        """Checks the tokenizer.

        Args:
          definition: the text of a tokenizer.json.
          source: its name in error messages.
          companions: the files beside it.

        Raises:
          UserError: it cannot be used as a tokenizer; the message names `source`.

        Warns:
          UserWarning: it drops merges at random, which is switched off.
        """
        self._source = source
        self._text = definition
        self._definition = _parse(definition, source)
        if self._definition["model"].get("dropout"):
            warnings.warn(f"{source}: model.dropout is switched off, with which a text has no fixed ids", stacklevel=2)
            self._definition["model"]["dropout"] = None
            self._text = json.dumps(self._definition, ensure_ascii=False)
        self.companions = dict(companions or {})
        self.settings = read_settings(self.companions, source)
        self.fingerprint = hashlib.sha256(json.dumps(self._definition, sort_keys=True).encode()).hexdigest()
        with rust_errors(f"{source} is not a usable tokenizer.json"):
            self._text_encoder = _build(self._definition)
            self._text_encoder.encode_special_tokens = True
            vocabulary = self._text_encoder.get_vocab(with_added_tokens=True)
        self._ids = vocabulary
        self.vocab_size = _checked_size(vocabulary, self._definition, source)
        self._bytes = bytes_of_tokens(vocabulary, self.vocab_size, self._definition, source)
        special = {token["content"]: token["id"] for token in self._definition["added_tokens"] if _is_control(token)}
        self.control_names = tuple(special)
        self.token_bytes = np.array([len(part) for part in self._bytes], np.int32)
        self.token_bytes[list(special.values())] = 0
        self.eos_id = self._require((*control.END_NAMES, self.settings.eos_token))
        self.bos_id = self._find((self.settings.bos_token, *control.BEGIN_NAMES), self.eos_id)
        self.pad_id = self._find((self.settings.pad_token, control.PADDING), self.eos_id)
        named = self._find((self.settings.eos_token,), self.eos_id)
        ends = (self.eos_id, named, *self.settings.end_ids)
        self.end_ids = tuple(dict.fromkeys(index for index in ends if index < self.vocab_size))
        adds = self.settings.add_bos
        self.adds_bos = _template_adds(self._definition, self.bos_id, vocabulary) if adds is None else adds
        self._probe()

    @classmethod
    def load(cls, path: str | Path, *, verified: bool = False) -> Tokenizer:
        """Loads a tokenizer.json, a gzipped one, or the one in a folder with the files beside it.

        Args:
          path: the file or folder.
          verified: the file was written by this project, as digests show. Any other is first tried in a process of its
            own, under limits of memory and time.

        Raises:
          UserError: it does not exist, cannot be read, cannot be used as a tokenizer, or is beyond the limits.
        """
        file, companions = Path(path), {}
        if file.is_dir():
            companions = read_companions(file)
            names = [name for name in (FILE_NAME, f"{FILE_NAME}.gz") if (file / name).exists()]
            file = checked_file(file.resolve(), names[0]) if names else file / FILE_NAME
        text = _read_text(file)
        if not verified:
            definition = _parse(text, str(file))
            if problem := try_tokenizer(json.dumps(_plain(definition)), _PROBE):
                raise UserError(f"{file} is not a usable tokenizer.json: {problem}")
        return cls(text, str(file), companions)

    def save(self, folder: str | Path) -> None:
        """Writes `folder`/tokenizer.json and the files beside it. If anything fails, an existing file stays as it was.

        Raises:
          UserError: the file cannot be written.
        """
        target = Path(folder) / FILE_NAME
        temporary = target.with_name(f".{FILE_NAME}.{os.getpid()}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            for name, content in {**self.companions, FILE_NAME: self._text}.items():
                temporary.write_text(content, encoding="utf-8")
                temporary.replace(target.with_name(name))
        except OSError as error:
            raise UserError(f"cannot write the tokenizer to {target}: {reason_of(error)}") from error

    def encode(self, text: str, *, control_tokens: bool = False) -> list[int]:
        """Returns the ids of a text, without begin and end tokens.

        Args:
          control_tokens: names of control tokens in `text` become their ids. Only for text from a trusted source.

        Raises:
          UserError: the text holds a lone surrogate, which has no UTF-8 form, or the tokenizer fails on it.
        """
        _check_utf8(text)
        encoder = self._control_encoder if control_tokens else self._text_encoder
        with rust_errors(f"{self._source} fails on a text of {len(text)} characters"):
            return encoder.encode(text, add_special_tokens=False).ids

    def encode_with_starts(self, text: str) -> tuple[list[int], list[int]]:
        """Returns the ids of a text in which names stand for control tokens, and the character where each id begins.

        Raises:
          UserError: as of `encode`.
        """
        _check_utf8(text)
        with rust_errors(f"{self._source} fails on a text of {len(text)} characters"):
            encoding = self._control_encoder.encode(text, add_special_tokens=False)
        return encoding.ids, [start for start, _ in encoding.offsets]

    def prompt_ids(self, text: str, *, control_tokens: bool = True) -> list[int]:
        """Returns the ids of a prompt: with the begin-of-text token where the model expects it, and never empty.

        Args:
          control_tokens: names of control tokens in `text` become their ids, as the user who writes a prompt expects.
        """
        ids = self.encode(text, control_tokens=control_tokens)
        if self.adds_bos and ids[:1] != [self.bos_id]:
            ids = [self.bos_id, *ids]
        # In training an end-of-text token precedes every document, so an empty prompt is the start of a document.
        return ids or [self.eos_id]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of several texts, encoded on all CPU cores."""
        for text in texts:
            _check_utf8(text)
        with rust_errors(f"{self._source} fails on the corpus"):
            encodings = self._text_encoder.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def to_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """Returns the bytes of ids: for control tokens their names, for ids outside the vocabulary nothing."""
        size = self.vocab_size
        return b"".join(self._bytes[index] for index in map(int, ids) if 0 <= index < size)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of ids. Bytes that are not UTF-8 (a character cut in two) become U+FFFD."""
        return self.to_bytes(ids).decode("utf-8", errors="replace")

    def control_id(self, name: str) -> int | None:
        """Returns the id of a control token by its name (`control_tokens`), or None where the tokenizer has none."""
        return self._ids.get(name)

    def with_chat_template(self, template: str) -> Tokenizer:
        """Returns a copy with another chat template, which `save` writes beside the tokenizer."""
        return Tokenizer(self._text, self._source, {**self.companions, CHAT_TEMPLATE: template})

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[str, str, dict[str, str]]]:
        # Rebuilt from the definition, because the library's pickle forgets not to search text for control tokens.
        return Tokenizer, (self._text, self._source, self.companions)

    @cached_property
    def _control_encoder(self) -> tokenizers.Tokenizer:
        return _build(self._definition)

    def _find(self, names: Sequence[str | None], default: int) -> int:
        return next((self._ids[name] for name in names if name in self._ids), default)

    def _require(self, names: Sequence[str | None]) -> int:
        found = self._find(names, -1)
        if found < 0:
            raise UserError(f"{self._source} has no end-of-text token; add one of {', '.join(control.END_NAMES)}")
        return found

    def _probe(self) -> None:
        """Encodes and decodes a line of text, to find tokenizers that fail, give wrong ids or lose text."""
        ids = self.encode(_PROBE)
        if any(index >= self.vocab_size for index in ids):
            raise UserError(f"{self._source} encodes text to ids outside its vocabulary of {self.vocab_size}")
        text = self.decode(ids)
        if text not in (_PROBE, " " + _PROBE):  # converted SentencePiece tokenizers add a leading space
            raise UserError(f"{self._source} does not decode to the text that was encoded; give a byte-level tokenizer")


@contextmanager
def rust_errors(what: str) -> Iterator[None]:
    """Turns what the tokenizers library raises into a UserError. (A Rust panic is only a BaseException.)"""
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
        with open_regular(file) as packed, gzip.open(packed) if file.suffix == ".gz" else packed as stream:
            raw = stream.read(LARGEST_FILE + 1)
    except (OSError, EOFError, zlib.error) as error:
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
    parsed = parse_object(definition.encode("utf-8", "surrogatepass"), source)
    if not isinstance(parsed.get("model"), dict):
        raise UserError(f"{source} is not a tokenizer.json: it has no object 'model'")
    parsed = {**parsed, "added_tokens": parsed.get("added_tokens") or []}
    added = parsed["added_tokens"]
    if not isinstance(added, list) or not all(
        isinstance(token, dict) and isinstance(token.get("id"), int) and isinstance(token.get("content"), str)
        for token in added
    ):
        raise UserError(f"{source} is not a usable tokenizer.json: each of 'added_tokens' needs an id and a content")
    if _expansion(parsed.get("normalizer")) > LARGEST_EXPANSION:
        raise UserError(f"{source}: its normalizers may lengthen a text more than {LARGEST_EXPANSION} times")
    return parsed


def _expansion(normalizer: Any) -> float:
    """Returns how many times longer the replacements of a normalizer can make a text."""
    if not isinstance(normalizer, dict):
        return 1.0
    nested, content = normalizer.get("normalizers"), normalizer.get("content")
    if isinstance(nested, list):
        return math.prod(map(_expansion, nested))
    if normalizer.get("type") != "Replace" or not isinstance(content, str):
        return 1.0
    pattern = normalizer.get("pattern")
    literal = pattern.get("String") if isinstance(pattern, dict) else None
    if isinstance(literal, str) and literal:
        return max(1.0, len(content) / len(literal))
    return 1.0 + len(content)  # a regular expression may match between any two characters


def _plain(definition: dict[str, Any]) -> dict[str, Any]:
    """Returns the definition with all control tokens marked, without truncation, padding, dropout or added tokens."""
    added = [{**token, "special": _is_control(token)} for token in definition["added_tokens"]]
    model = {**definition["model"], **({"dropout": None} if "dropout" in definition["model"] else {})}
    absent = {"truncation": None, "padding": None, "post_processor": None}
    return {**definition, "added_tokens": added, "model": model, **absent}


def _build(definition: dict[str, Any]) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(_plain(definition)))


def _template_adds(definition: dict[str, Any], index: int, vocabulary: dict[str, int]) -> bool:
    """Returns whether the tokenizer's own post-processor puts the token `index` before a text."""
    processor = definition.get("post_processor")
    parts = processor.get("processors", [processor]) if isinstance(processor, dict) else []
    for part in parts if isinstance(parts, list) else []:
        single = part.get("single") if isinstance(part, dict) else None
        first = single[0] if isinstance(single, list) and single else None
        token = first.get("SpecialToken") if isinstance(first, dict) else None
        if isinstance(token, dict) and vocabulary.get(str(token.get("id"))) == index:
            return True
    return False


def _is_control(token: dict[str, Any]) -> bool:
    """Returns whether an added token is a control token.

    Published tokenizers do not mark all of them as special, so their names decide too.
    """
    return bool(token.get("special")) or token["content"].startswith("<")


def _checked_size(vocabulary: dict[str, int], definition: dict[str, Any], source: str) -> int:
    declared = {token["content"]: token["id"] for token in definition["added_tokens"]}
    for token, index in (*vocabulary.items(), *declared.items()):
        if not 0 <= index < len(vocabulary) + MOST_UNUSED_IDS:
            raise UserError(
                f"{source}: token {token!r} has id {index}, far outside its vocabulary of {len(vocabulary)}"
            )
    for token, index in declared.items():
        if vocabulary.get(token) != index:
            raise UserError(f"{source}: added token {token!r} declares id {index} but has id {vocabulary.get(token)}")
    return max(vocabulary.values(), default=-1) + 1
