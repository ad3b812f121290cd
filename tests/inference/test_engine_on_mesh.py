"""Checks the engine on a mesh: data, expert and tensor axes, with redundant experts, give one device's text."""

from __future__ import annotations

from pathlib import Path

import pytest
from simulated import run_simulated

pytestmark = pytest.mark.slow


@pytest.mark.timeout(240)
def test_the_text_is_that_of_one_device() -> None:
    result = run_simulated(Path(__file__).with_name("simulated_engine.py"))
    assert result["same_text"] == [True] * 6
    assert result["error"] < 1e-3
    assert result["shards"] == 8
    assert result["load"]
    assert result["free_pages"]
    assert result["placed_again"]  # copies of other experts, by the load of the first four requests
    assert result["compilations"] == 0
