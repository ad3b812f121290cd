"""Checks that a checkpoint saved on one mesh is restored bit for bit on another mesh and on a single device."""

from __future__ import annotations

from pathlib import Path

import pytest
from simulated import run_simulated

pytestmark = pytest.mark.slow


def test_restored_on_other_meshes(tmp_path: Path) -> None:
    found = run_simulated(Path(__file__).with_name("simulated_checkpoints.py"), str(tmp_path / "run"))
    assert {mesh: values["devices"] for mesh, values in found.items()} == {
        "data=8": 8,
        "stage=2,fsdp=2,expert=2": 8,
        "": 1,
    }
    assert all(values["layout"] for values in found.values())
