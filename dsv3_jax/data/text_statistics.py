"""Baselines for bits per byte: how well a text can be compressed without a model."""

from __future__ import annotations

import gzip

import numpy as np


def byte_entropy(text: bytes) -> float:
    """Returns the entropy in bits per byte of a code that knows only how frequent each byte is."""
    counts = np.bincount(np.frombuffer(text, np.uint8), minlength=256)
    share = counts[counts > 0] / max(len(text), 1)
    return float(-np.sum(share * np.log2(share)))


def gzip_bits_per_byte(text: bytes) -> float:
    """Returns the size of the text compressed by gzip -9, in bits per byte of the text."""
    return 8.0 * len(gzip.compress(text, 9, mtime=0)) / max(len(text), 1)
