"""Checks that the stored golden data is what the independent implementation computes today."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "golden"
CHECKPOINTS = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))

pytestmark = pytest.mark.oracle


def run_oracle(python: str, *arguments: str) -> str:
    command = [python, str(HERE / "make_golden.py"), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_stored_values_are_recomputed(oracle_python: str) -> None:
    folders = [str(GOLDEN / name) for name in CHECKPOINTS]
    report = json.loads(run_oracle(oracle_python, "check", *folders))
    assert sorted(report) == CHECKPOINTS
    for name, differences in report.items():
        for tensor, difference in differences.items():
            # Ids are equal; the rest agrees to a few float32 roundings of values below 6.
            assert difference <= (0 if tensor in ("ids", "greedy") else 4e-6), (name, tensor)


def test_checkpoints_are_made_from_their_seeds(oracle_python: str, tmp_path: Path) -> None:
    run_oracle(oracle_python, "make", str(tmp_path))
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made
    for name in made:
        assert json.loads((tmp_path / name / "config.json").read_text()) == json.loads(
            (GOLDEN / name / "config.json").read_text()
        )
        for file in ("model.safetensors", "io.safetensors"):
            stored, again = load_file(GOLDEN / name / file), load_file(tmp_path / name / file)
            assert stored.keys() == again.keys()
            for tensor in stored:
                np.testing.assert_allclose(again[tensor], stored[tensor], rtol=0, atol=4e-6, err_msg=tensor)
