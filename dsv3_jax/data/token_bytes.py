"""The bytes each token stands for: what turns nats a token into bits a byte, exactly."""

from __future__ import annotations

import re
from typing import Any

from dsv3_jax.errors import UserError

_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def bytes_of_tokens(vocabulary: dict[str, int], size: int, definition: dict[str, Any], source: str) -> list[bytes]:
    """Bytes by id; added tokens as the UTF-8 of their names, ids without a token as nothing.

    Args:
      vocabulary: token to id, all below `size`.
      definition: the tokenizer.json; its decoder tells how tokens are spelled.

    Raises:
      UserError: tokens do not stand for bytes (lower-cased, stripped or word-piece vocabularies).
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
    """Byte-level tokens spell each byte as one visible character: itself where printable, else from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    table = {chr(byte): byte for byte in visible}
    table.update({chr(0x100 + place): byte for place, byte in enumerate(hidden)})
    return table
