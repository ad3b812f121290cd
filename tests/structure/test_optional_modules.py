"""Checks that training and checkpoints work where the modules that read corpora and arguments are not installed."""

import subprocess
import sys

import pytest

BLOCKED = ("array_record", "grain", "tensorboardX", "tyro")
NEEDED = (
    "dsv3_jax.data",
    "dsv3_jax.interop",
    "dsv3_jax.runs.checkpoints",
    "dsv3_jax.runs.step_inputs",
    "dsv3_jax.training.defaults",
    "dsv3_jax.training.step",
)


@pytest.mark.slow
def test_modules_are_imported_when_they_are_used():
    # A module that is None in sys.modules cannot be imported.
    program = f"import sys; sys.modules.update(dict.fromkeys({BLOCKED}))\n" + "\n".join(f"import {n}" for n in NEEDED)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert not done.returncode, done.stderr[-2000:]
