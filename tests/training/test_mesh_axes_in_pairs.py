"""Axes of the mesh in pairs, and three at once with every kind of layer: the step equals the step on one device."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from simulated import run_simulated
from test_mesh_axes_alone import check_equal

_SCRIPT = Path(__file__).with_name("simulated_training.py")
PAIRS = tuple(f"{one}=2,{two}=2" for one, two in itertools.combinations(("data", "fsdp", "expert", "tensor"), 2))


@pytest.fixture(scope="module")
def pairs() -> dict[str, dict[str, Any]]:
    return run_simulated(_SCRIPT, "small", *PAIRS)


@pytest.mark.parametrize("mesh", PAIRS)
def test_step_equals_one_device(pairs: dict[str, dict[str, Any]], mesh: str) -> None:
    check_equal(pairs[mesh])


def test_stages_divide_parameters_and_moments() -> None:
    """Of the pipeline itself `tests/pipeline` says more; here it stands in the training step."""
    (found,) = run_simulated(_SCRIPT, "staged", "stage=2,data=2").values()
    check_equal(found)
    assert found["parameters"] < 0.6
    assert found["moments"] < 0.4


def test_every_kind_of_layer_in_two_passes() -> None:
    (found,) = run_simulated(_SCRIPT, "whole", "fsdp=2,expert=2,tensor=2").values()
    check_equal(found)
