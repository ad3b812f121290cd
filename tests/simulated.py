"""Runs a script of the tests in a process with eight simulated devices, and returns the JSON of its last line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

_TESTS = Path(__file__).resolve().parent
# Options of the compiler for CPUs: no MLIR for fused operations, no unrolled loops, one piece of work per program.
QUICK_TO_COMPILE = (
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters,xla_cpu_disable_loop_unrolling "
    "--xla_cpu_parallel_codegen_split_count=1"
)
# Runs a script as Python does, but looks for garbage less often, for the reason given in conftest.py.
_START = """
import gc, os, runpy, sys
gc.set_threshold(100_000, 50, 100)
del sys.argv[0]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""
FLAGS = {"XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {QUICK_TO_COMPILE}", "JAX_PLATFORMS": "cpu"}
SIXTEEN = {"XLA_FLAGS": FLAGS["XLA_FLAGS"].replace("=8", "=16", 1)}


def environment(**changes: str) -> dict[str, str]:
    """Returns this process's environment, with the project first on Python's path and the tests' modules after it."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(_TESTS.parent), str(_TESTS)])} | changes


def run_simulated(script: Path, *arguments: str, **changes: str) -> Any:
    """Runs `script` with `changes` to its environment and returns the JSON on the last line that it prints."""
    command = [sys.executable, "-c", _START, str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(**FLAGS | changes), check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
