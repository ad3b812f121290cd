"""Checks that a step with pipeline stages, alone and with data and expert ranks, equals the step on one device.

`tests/pipeline` combines stages with fsdp and tensor at once, and checks the parts of the pipeline.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from simulated import run_simulated
from test_mesh_axes_alone import check_equal

pytestmark = pytest.mark.slow

_SCRIPT = Path(__file__).with_name("simulated_training.py")
MESHES = ("stage=2,data=2,expert=2",)


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    return run_simulated(_SCRIPT, "staged", *MESHES)


@pytest.mark.parametrize("mesh", MESHES)
def test_step_equals_one_device(results: dict[str, dict[str, Any]], mesh: str) -> None:
    check_equal(results[mesh])


def test_stages_of_unequal_numbers_of_layers() -> None:
    """With one and three of four MoE layers, masters are sharded over the stages by width, so that shards are equal."""
    (found,) = run_simulated(_SCRIPT, "uneven", "stage=2").values()
    check_equal(found)
    assert found["parameters"] < 0.51


def test_stages_divide_parameters_and_moments(results: dict[str, dict[str, Any]]) -> None:
    """Moments are sharded over replicas too (ZeRO-1)."""
    for found in results.values():
        assert found["parameters"] < 0.6
    assert results["stage=2,data=2,expert=2"]["moments"] < 0.4
