"""Checks, for each axis of the mesh alone, that a training step on simulated devices equals the step on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from simulated import run_simulated

pytestmark = pytest.mark.slow

_SCRIPT = Path(__file__).with_name("simulated_training.py")
MESHES = ("data=8", "fsdp=8", "expert=4", "tensor=2")


def check_equal(found: dict[str, Any]) -> None:
    """Checks equality up to the order of float32 sums; loads and biases must be exactly equal.

    An update is as large as the learning rate whatever its gradient, also where the gradient is only rounding error.
    That is why updates are compared by their mean instead of their largest difference.
    """
    assert found["load"] == found["biases"] == 0
    assert found["uneven"] > 1.2
    assert found["loss"] < 2e-6
    assert found["norm"] < 1e-5
    assert found["gradient"] < 2e-5
    assert found["update"] < 2e-3


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    return run_simulated(_SCRIPT, "small", *MESHES)


@pytest.mark.parametrize("mesh", MESHES)
def test_step_equals_one_device(results: dict[str, dict[str, Any]], mesh: str) -> None:
    check_equal(results[mesh])


def test_state_is_divided(results: dict[str, dict[str, Any]]) -> None:
    """Replicas keep whole parameters but shards of the moments (ZeRO-1); FSDP shards both."""
    assert results["data=8"]["parameters"] == 1
    assert results["data=8"]["moments"] < 0.2
    assert results["fsdp=8"]["parameters"] < 0.2
    assert results["fsdp=8"]["moments"] < 0.2
    assert results["expert=4"]["moments"] < results["expert=4"]["parameters"] < 1
