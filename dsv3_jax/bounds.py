"""Smallest and largest values of the numbers in a configuration.

Every number that a user can set has bounds, wide enough for any real run: a larger number is a slip of the keyboard or
a broken file, which would end in a traceback, in all memory being used, or in a wait without end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsv3_jax.errors import ConfigError

LARGEST_SEED = 2**32 - 1
LARGEST_COUNT = 2**31 - 1
"""Largest number that every library takes for a number of things."""


def check_bounds(config: Any, bounds: Mapping[str, tuple[float, float]], prefix: str = "") -> None:
    """Checks fields of a dataclass.

    Args:
      config: the dataclass.
      bounds: smallest and largest value by the field's name. Where the smallest is an int, so must the value be.
      prefix: what messages put before the field's name.

    Raises:
      ConfigError: a value is not a number of the right kind, NaN, or out of its bounds; the message names the field.
    """
    for name, (least, most) in bounds.items():
        value = getattr(config, name)
        whole = isinstance(least, int)
        is_number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not is_number or not least <= value <= most:
            kind = "a whole number" if whole else "a number"
            raise ConfigError(
                f"{prefix}{name} must be {kind} from {_shown(least)} to {_shown(most)}, not {value!r:.80}"
            )


def _shown(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"
