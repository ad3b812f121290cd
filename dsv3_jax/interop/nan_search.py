"""Finds NaN in arrays of any float dtype by their bits: numpy's test of bfloat16 and float8 is slow, one by one."""

from __future__ import annotations

import numpy as np

from dsv3_jax.interop.fp8_weights import E4M3

_CHUNK = 1 << 16  # elements, so that they stay in a core's cache
# dtype: the unsigned integer of its width, and the largest value of its bits without the sign that is not NaN.
_LARGEST_NUMBER = {
    "float32": (np.uint32, 0x7F800000),
    "bfloat16": (np.uint16, 0x7F80),
    "float16": (np.uint16, 0x7C00),
    E4M3.name: (np.uint8, 0x7E),
}


def has_nan(array: np.ndarray) -> bool:
    """Tells whether an array of float32, bfloat16, float16 or e4m3 holds NaN."""
    kind, largest = _LARGEST_NUMBER[array.dtype.name]
    bits = np.ascontiguousarray(array).reshape(-1).view(kind)
    magnitude = kind(np.iinfo(kind).max >> 1)
    return any(int((bits[first : first + _CHUNK] & magnitude).max()) > largest for first in range(0, bits.size, _CHUNK))
