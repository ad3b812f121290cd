"""Checks in new processes that no order of imports changes what the public names of `dsv3_jax` stand for."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(program: str) -> str:
    """Returns what a program prints, which runs in a process of its own."""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.slow
def test_every_public_name_is_what_it_says_whatever_was_imported_before():
    program = (
        "import importlib, pkgutil, types, dsv3_jax\n"
        "dsv3_jax.ModelConfig.preset('tiny')\n"
        "for module in pkgutil.iter_modules(dsv3_jax.__path__):\n"
        "    importlib.import_module(f'dsv3_jax.{module.name}')\n"
        "from dsv3_jax import *\n"
        "names = {name: globals()[name] for name in dsv3_jax.__all__}\n"
        "assert not [name for name, value in names.items() if isinstance(value, types.ModuleType)], names\n"
        "print(*presets())\n"
    )
    assert "nano" in run(program).split()


def test_dir_lists_each_name_once():
    assert run("import dsv3_jax as d; d.presets; names = dir(d); print(len(names) == len(set(names)))") == "True\n"


@pytest.mark.slow
def test_plans_and_plots_leave_the_choice_of_matplotlib_s_backend_to_others():
    program = "import sys, dsv3_jax.planning.picture, dsv3_jax.runs.plots; print('matplotlib.pyplot' in sys.modules)"
    assert run(program) == "False\n"


def test_importing_the_package_does_not_import_jax():
    assert run("import sys, dsv3_jax; dsv3_jax.ModelConfig.preset('tiny'); print('jax' in sys.modules)") == "False\n"
