"""Compiles every kernel and tuning entry for Hopper and TPUs on a machine with neither, and checks the reports."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from pallas_kernels import compile_ahead

WHEELS = pathlib.Path(__file__).parents[2] / ".venv" / "aot"
OPERATIONS = ("blockwise_matmul", "grouped_matmul", "quantize", "routing")


def compiled(target: str) -> dict[str, list[dict]]:
    """Returns the output of `python -m pallas_kernels.compile_ahead`, run with the compilers' wheels on its path."""
    path = os.pathsep.join([str(WHEELS), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-m", "pallas_kernels.compile_ahead", target, *OPERATIONS],
        env={**os.environ, "PYTHONPATH": path, "JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""},
        cwd=WHEELS.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode == 2:
        pytest.skip(run.stderr.strip().splitlines()[-1])
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


@pytest.mark.aot
def test_hopper_kernels_compile_without_spills():
    cases = [case for operation in compiled("hopper").values() for case in operation]
    kernels = [(case["case"], kernel) for case in cases for kernel in case["kernels"]]
    assert len({kernel["kernel"] for _, kernel in kernels}) == 14
    for name, kernel in kernels:
        assert kernel["spill_store_bytes"] == kernel["spill_load_bytes"] == kernel["stack_bytes"] == 0, (name, kernel)
        assert not kernel["set_max_registers_ignored"], name
        assert kernel["shared_memory_bytes"] <= 232_448, name
        assert not kernel["serialized_wgmma"], name
        assert bool(kernel["tensor_core"]) == ("matmul" in kernel["kernel"]), name
        if kernel["kernel"] == "blockwise_matmul":
            (instruction,) = kernel["tensor_core"]
            assert instruction.endswith("k32.f32.e4m3.e4m3"), name
            width = int(instruction.split("n")[-1].split("k32")[0])
            # One fused multiply-add per total: the promotion, and nothing that is computed twice.
            assert kernel["fused_multiply_adds"] == 64 * width // 128, name


@pytest.mark.aot
@pytest.mark.parametrize("target", compile_ahead.TPU_TOPOLOGIES)
def test_tpu_kernels_compile(target):
    cases = [case for operation in compiled(target).values() for case in operation]
    assert len(cases) > 10
    assert all(case["program_bytes"] > 0 for case in cases)


def test_missing_compilers_are_named(monkeypatch):
    monkeypatch.setattr(compile_ahead.importlib.util, "find_spec", lambda name: None)
    assert "install the extra 'aot'" in compile_ahead.why_unavailable("hopper")
    assert "libtpu" in compile_ahead.why_unavailable("v6e")
    monkeypatch.setattr(compile_ahead.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(compile_ahead.shutil, "which", lambda name: None)
    assert "ptxas is not on PATH" in compile_ahead.why_unavailable("hopper")
    assert compile_ahead.main(["hopper", "quantize"]) == 2
