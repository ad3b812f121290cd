"""What the files beside a published tokenizer say: begin and end tokens, sampling defaults, the chat template.

A tokenizer keeps these files and saves them with itself, so that a run, its checkpoints and an export have them too.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv3_jax.bounded_json import parse_object, read_object
from dsv3_jax.errors import UserError
from dsv3_jax.regular_files import checked_file, checked_folder, read_regular

TOKENIZER_CONFIG, GENERATION_CONFIG = "tokenizer_config.json", "generation_config.json"
MODEL_TOKENS = "model_tokens.json"
"""The begin, end and padding ids of the model's config.json; a file of ours, since a run has no such config.json."""

_FILES = (TOKENIZER_CONFIG, GENERATION_CONFIG, MODEL_TOKENS, "special_tokens_map.json", "added_tokens.json")
CHAT_TEMPLATE, OLDER_CHAT_TEMPLATE = "chat_template.jinja", "chat_template.json"
_TOKEN_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_LARGEST_FILE = 10_000_000  # bytes

Companions = Mapping[str, str]
"""Contents of the files beside a tokenizer.json, by their names."""


@dataclasses.dataclass(frozen=True)
class TokenizerSettings:
    """Settings of a published model's text. None where the files say nothing.

    Attributes:
      add_bos: whether a prompt begins with the begin-of-text token.
      bos_token, eos_token, pad_token: names of tokens.
      end_ids: ids that end a continuation, such as the end of a text and the end of a turn.
      chat_template: Jinja text that renders the messages of a chat.
      temperature, top_k, top_p: how the model's authors sample; a temperature of 0 takes the most likely token.
    """

    add_bos: bool | None = None
    bos_token: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None
    end_ids: tuple[int, ...] = ()
    chat_template: str | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None


def read_companions(folder: Path) -> dict[str, str]:
    """Returns the files beside the tokenizer in `folder`, and the token ids of its config.json if it has one.

    Raises:
      UserError: a file cannot be read, is too large, or is a link that leads out of the folder.
    """
    folder = checked_folder(folder)
    found = {}
    for name in (*_FILES, CHAT_TEMPLATE, OLDER_CHAT_TEMPLATE):
        if (folder / name).exists():
            raw = read_regular(checked_file(folder, name), max_bytes=_LARGEST_FILE)
            try:
                found[name] = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{folder / name} is not UTF-8 at byte {error.start}") from None
    if (folder / "config.json").exists() and MODEL_TOKENS not in found:
        config = read_object(checked_file(folder, "config.json"), max_bytes=_LARGEST_FILE)
        ids = {name: config[name] for name in _TOKEN_FIELDS if config.get(name) is not None}
        found |= {MODEL_TOKENS: json.dumps(ids)} if ids else {}
    return found


def read_settings(companions: Companions, source: str) -> TokenizerSettings:
    """Returns what the files say.

    Args:
      companions: the files.
      source: name of the tokenizer in messages.

    Raises:
      UserError: a file is not JSON, or a field has a value of the wrong type.
    """
    names = _object(companions, TOKENIZER_CONFIG, source)
    generation = _object(companions, GENERATION_CONFIG, source)
    tokens = _object(companions, MODEL_TOKENS, source)

    def typed(values: dict[str, Any], name: str, *kinds: type) -> Any:
        value = values.get(name)
        if value is not None and type(value) not in kinds:
            raise UserError(f"{source}: beside it, {name} is {value!r:.60}, which cannot be used")
        return value

    def token(name: str) -> str | None:
        value = names.get(name)
        return typed(value if isinstance(value, dict) else names, "content" if isinstance(value, dict) else name, str)

    ends: list[int] = []
    for values in (tokens, generation):
        ids = values.get("eos_token_id")
        ends += ids if isinstance(ids, list) else [] if ids is None else [ids]
    if any(type(each) is not int or each < 0 for each in ends):
        raise UserError(f"{source}: beside it, eos_token_id is {ends!r:.60}, which cannot be used")
    temperature, top_k, top_p = (typed(generation, name, int, float) for name in ("temperature", "top_k", "top_p"))
    sampled = typed(generation, "do_sample", bool)
    if sampled is None and (temperature, top_k, top_p) != (None, None, None):
        sampled = True
    return TokenizerSettings(
        add_bos=typed(names, "add_bos_token", bool),
        bos_token=token("bos_token"),
        eos_token=token("eos_token"),
        pad_token=token("pad_token"),
        end_ids=tuple(dict.fromkeys(ends)),
        chat_template=_chat_template(companions, names, source),
        temperature=None if sampled is None else (1.0 if temperature is None else float(temperature)) * sampled,
        top_k=int(top_k) if sampled and top_k else None,  # 0 stands for all tokens
        top_p=float(top_p) if sampled and top_p is not None and top_p < 1 else None,
    )


def _chat_template(companions: Companions, names: dict[str, Any], source: str) -> str | None:
    """Returns the template in the file of its own, else the one in tokenizer_config.json, of several the default."""
    if CHAT_TEMPLATE in companions:
        return companions[CHAT_TEMPLATE]
    template = names.get("chat_template", _object(companions, OLDER_CHAT_TEMPLATE, source).get("chat_template"))
    if isinstance(template, list):
        named = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise UserError(f"{source}: beside it, chat_template is {template!r:.60}, which cannot be used")
    return template


def _object(companions: Companions, name: str, source: str) -> dict[str, Any]:
    return parse_object(companions[name].encode(), f"{source}: {name} beside it") if name in companions else {}
