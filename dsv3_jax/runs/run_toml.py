"""The configuration of a run as a TOML file, which `dsv3 train --config` reads."""

from __future__ import annotations

import json
from typing import Any

from dsv3_jax.training.config import RunConfig

_HEAD = "# The configuration of a run. To repeat it: dsv3 train --config run.toml --out FOLDER\n\n"


def to_toml(config: RunConfig) -> str:
    """Returns every field of a configuration as TOML: a table for each part of it."""
    return _HEAD + _table(config.to_dict(), "")


def _table(values: dict[str, Any], name: str) -> str:
    own = "".join(f"{key} = {_value(value)}\n" for key, value in values.items() if not isinstance(value, dict))
    below = [(f"{name}{key}", value) for key, value in values.items() if isinstance(value, dict)]
    return own + "".join(f"\n[{key}]\n{_table(value, f'{key}.')}" for key, value in below)


def _value(value: Any) -> str:
    match value:
        case None:
            return '"none"'
        case bool():
            return str(value).lower()
        case str():  # a JSON string is a TOML string, but for DEL and for characters that are no Unicode scalars
            return json.dumps(value).replace("\x7f", "\\u007f")
        case _:
            return repr(value)
