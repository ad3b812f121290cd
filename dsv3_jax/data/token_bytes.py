"""The bytes that each token stands for, which convert nats per token to bits per byte exactly."""

from __future__ import annotations

import re
from typing import Any

from dsv3_jax.errors import UserError

_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def bytes_of_tokens(vocabulary: dict[str, int], size: int, definition: dict[str, Any], source: str) -> list[bytes]:
    """Returns the bytes of each id: for added tokens the UTF-8 of their names, for ids without a token no bytes.

    Args:
      vocabulary: token to id, all ids below `size`.
      size: number of ids.
      definition: content of the tokenizer.json. Its decoder says how tokens spell bytes.
      source: name of the tokenizer in messages.

    Raises:
      UserError: tokens do not stand for bytes, as in lower-cased, stripped or word-piece vocabularies.
    """
    kinds = _decoder_kinds(definition.get("decoder"))
    if "ByteLevel" in kinds:
        table = _byte_of_character()

        def spell(token: str) -> bytes:
            return bytes(table[character] for character in token)

    elif "ByteFallback" in kinds:

        def spell(token: str) -> bytes:
            match = _FALLBACK.fullmatch(token)
            return bytes([int(match[1], 16)]) if match else token.replace("▁", " ").encode()

    else:
        raise UserError(f"{source} is not a byte-level tokenizer: its decoder must be ByteLevel or use ByteFallback")
    added = {token["content"] for token in definition["added_tokens"]}
    result = [b""] * size
    for token, index in vocabulary.items():
        try:
            result[index] = token.encode() if token in added else spell(token)
        except (KeyError, UnicodeEncodeError):
            raise UserError(f"{source}: token {token!r} (id {index}) does not spell bytes") from None
    return result


def _decoder_kinds(decoder: Any) -> set[str]:
    if not isinstance(decoder, dict):
        return set()
    nested = decoder.get("decoders")
    parts = nested if isinstance(nested, list) else []
    return {str(decoder.get("type"))}.union(*(_decoder_kinds(part) for part in parts))


def _byte_of_character() -> dict[str, int]:
    """Returns the byte that each character of a byte-level token stands for.

    A printable byte is spelled as the character of its own number; the others use the characters from U+0100.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    table = {chr(byte): byte for byte in visible}
    table.update({chr(0x100 + position): byte for position, byte in enumerate(hidden)})
    return table
