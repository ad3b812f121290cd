"""How predictable a text is without a model: what a model must beat."""

from __future__ import annotations

import gzip

import numpy as np


def byte_entropy(text: bytes) -> float:
    """Zeroth-order entropy in bits a byte: the cost of a code that knows only how frequent each byte is."""
    counts = np.bincount(np.frombuffer(text, np.uint8), minlength=256)
    share = counts[counts > 0] / max(len(text), 1)
    return float(-np.sum(share * np.log2(share)))


def gzip_bits_per_byte(text: bytes) -> float:
    """Bits a byte of the text after gzip at its best."""
    return 8.0 * len(gzip.compress(text, 9, mtime=0)) / max(len(text), 1)
