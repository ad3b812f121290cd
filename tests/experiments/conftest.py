"""The modules of `report_run`, shared by its tests."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture(scope="module")
def run() -> Iterator[SimpleNamespace]:
    """Returns the names of `report_run` and its parts, imported with the import path that running it would have."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXPERIMENTS))
        parts = [importlib.import_module(name) for name in ("report_memory", "report_time", "report_run")]
        yield SimpleNamespace(**{name: value for part in parts for name, value in vars(part).items()})
    for name in set(sys.modules) - before:
        if (EXPERIMENTS / f"{name}.py").exists():
            del sys.modules[name]
