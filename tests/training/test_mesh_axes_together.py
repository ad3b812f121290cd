"""Checks that a step on a mesh in which each axis meets each other one, none of them stages, equals one device's."""

from __future__ import annotations

from pathlib import Path

import pytest
from simulated import SIXTEEN, run_simulated
from test_mesh_axes_alone import check_equal

pytestmark = pytest.mark.slow

_SCRIPT = Path(__file__).with_name("simulated_training.py")


@pytest.mark.parametrize(
    ("kind", "mesh"),
    [
        ("with_mtp", "data=2,fsdp=2,expert=2,tensor=2"),
        ("muon-with_mtp", "data=2,fsdp=2,expert=2,tensor=2"),
        ("masked-with_mtp", "fsdp=2,context=2,expert=2,tensor=2"),
        ("muon-with_mtp", "context=8"),
    ],
)
def test_step_equals_one_device(kind: str, mesh: str) -> None:
    devices = {} if mesh == "context=8" else SIXTEEN
    (found,) = run_simulated(_SCRIPT, kind, mesh, **devices).values()
    check_equal(found)


@pytest.mark.parametrize("kind", ["taught-small", "pairs-small"])
def test_step_of_another_objective_equals_one_device(kind: str) -> None:
    """Distillation and the loss of a reward model are sums over rows, as the loss of the next token is."""
    (found,) = run_simulated(_SCRIPT, kind, "data=2,fsdp=2,expert=2").values()
    check_equal(found)
