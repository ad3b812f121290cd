"""Finds the independent implementation, which has its own Python so that torch and JAX share no process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def oracle_python() -> str:
    """Returns the interpreter that has torch and transformers; skips the test where there is none."""
    named = os.environ.get("DSV3_ORACLE_PYTHON")
    if named:
        return named
    default = ROOT / ".venv-oracle" / "bin" / "python"
    if not default.exists():
        pytest.skip("no torch and transformers: run `make test-oracle`, or set DSV3_ORACLE_PYTHON")
    return str(default)
