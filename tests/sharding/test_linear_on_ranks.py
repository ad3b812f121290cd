"""Checks that linear maps on a mesh give one device's results, FP8 tiles included, and share its work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from simulated import run_simulated

_SCRIPT = Path(__file__).with_name("simulated_linear.py")

pytestmark = pytest.mark.slow

MESHES = {"data=2,fsdp=2": 4, "fsdp=4": 4, "fsdp=2,tensor=2": 4, "context=2": 2, "fsdp=2,context=2": 4}
"""And over how many devices they divide the work: tokens over data, fsdp and context, widths over tensor."""


@pytest.fixture(scope="module", params=[96, 128], ids=["plain norm", "norm that quantizes"])
def results(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    """96 / 4: shards of the weight that are not whole blocks; the norm quantizes its output in whole tiles of 128."""
    return run_simulated(_SCRIPT, str(request.param), "fp8,compute_dtype=float32", *MESHES)


@pytest.mark.parametrize("mesh", MESHES)
def test_fp8_equals_one_device(results: dict[str, dict[str, Any]], mesh: str) -> None:
    """Results agree up to the order of float32 sums; a weight or token rounded otherwise would change them by 1%."""
    assert results[mesh]["apart"] < 1e-5


@pytest.mark.parametrize("mesh", MESHES)
def test_every_device_does_its_part_of_the_work(results: dict[str, dict[str, Any]], mesh: str) -> None:
    """Every device would do the whole of a product that XLA cannot partition; quantising weights is not divided."""
    assert results[mesh]["work"] < 1.3 / MESHES[mesh]
