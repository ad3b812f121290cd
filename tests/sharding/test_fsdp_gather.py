"""Checks that weights gathered in FP8 have the bits of whole weights in FP8, for a quarter of the bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from simulated import run_simulated

pytestmark = pytest.mark.slow


def test_gathering_in_fp8_equals_quantizing_what_was_gathered() -> None:
    results = run_simulated(Path(__file__).with_name("simulated_gather.py"))
    assert set(results) == {"whole", "columns", "rows", "small", "down", "odd", "one"}
    for name, found in results.items():
        assert found["values"], name
        assert found["scales"], name
        assert found["gradient"] < 1e-5, name  # sums of eight float32 numbers
    assert results["whole"]["sent"] < 0.2501
    assert results["columns"]["sent"] < 0.2515  # and the largest magnitudes of 130 x 32 columns
