"""Compiles every kernel for Hopper and TPUs on a machine with neither, and checks the compilers' reports.

`make test-aot` compiles the variants too: every tiling and every size.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from pallas_kernels import compile_ahead

WHEELS = pathlib.Path(__file__).parents[2] / ".venv" / "aot"
OPERATIONS = (
    "blockwise_matmul",
    "grouped_matmul",
    "latent_attention",
    "latent_decode",
    "quantize",
    "rms_norm",
    "routing",
    "swiglu",
)


def compiled(target: str, operations: tuple[str, ...] = OPERATIONS) -> dict[str, list[dict]]:
    """Returns the output of `python -m pallas_kernels.compile_ahead`, run with the compilers' wheels on its path."""
    path = os.pathsep.join([str(WHEELS), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-m", "pallas_kernels.compile_ahead", target, *operations],
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


@pytest.fixture(scope="module")
def hopper_kernels() -> list[tuple[str, dict]]:
    """The name of the case and the report of every kernel compiled for Hopper."""
    cases = [case for operation in compiled("hopper").values() for case in operation]
    return [(case["case"], kernel) for case in cases for kernel in case["kernels"]]


@pytest.mark.aot
def test_hopper_kernels_compile_without_spills(hopper_kernels):
    assert len({kernel["kernel"] for _, kernel in hopper_kernels}) == 22
    for name, kernel in hopper_kernels:
        # Attention's accumulators take nearly all registers: some scalars of the loop over tiles are spilled.
        spilled = 160 if kernel["kernel"].startswith("latent_attention") else 0
        for what in ("spill_store_bytes", "spill_load_bytes", "stack_bytes"):
            assert kernel[what] <= spilled, (name, kernel)
        assert not kernel["set_max_registers_ignored"], name
        assert kernel["shared_memory_bytes"] <= 232_448, name
        assert not kernel["serialized_wgmma"], name
        assert bool(kernel["tensor_core"]) == any(word in kernel["kernel"] for word in ("matmul", "latent")), name
        if kernel["kernel"] == "blockwise_matmul":
            (instruction,) = kernel["tensor_core"]
            assert instruction.endswith("k32.f32.e4m3.e4m3"), name
            width = int(instruction.split("n")[-1].split("k32")[0])
            # One fused multiply-add per total and wave: the promotion, and nothing that is computed twice.
            waves = 2 if ", 256 x" in name else 1
            assert kernel["fused_multiply_adds"] == waves * 64 * width // 128, name


@pytest.mark.aot
def test_products_of_attention_run_without_waits_between_them(hopper_kernels):
    """Where registers do not suffice, the assembler waits after each product without a warning that says so."""
    loops = {
        (name, kernel["kernel"]): kernel["main_loop"]
        for name, kernel in hopper_kernels
        if kernel["kernel"].startswith("latent_attention")
    }
    if None in loops.values():
        pytest.skip("nvdisasm is missing: make setup-aot installs it")
    assert len(loops) == 6
    for name, loop in loops.items():
        assert loop.count("WGMMA") >= 4 * loop.count("WAIT") > 0, name
        if "backward" in name[1]:
            assert loop.count("WAIT") <= 3, name
            assert loop.count("SPILL") <= 10, name  # most where segments are compared


@pytest.mark.aot
def test_loads_of_scales_never_delay_a_product(hopper_kernels):
    """In each step of an FP8 main loop scales are loaded while the products run, and nothing delays the release."""
    loops = {name: kernel["main_loop"] for name, kernel in hopper_kernels if "e4m3" in str(kernel["tensor_core"])}
    if None in loops.values():
        pytest.skip("nvdisasm is missing: make setup-aot installs it")
    for name, loop in loops.items():
        waits = [index for index, what in enumerate(loop) if what == "WAIT"]
        loads = [index for index, what in enumerate(loop) if what.startswith("LOAD")]
        assert loop.count("WGMMA") == 4 * len(waits), name  # of 32 of K each, and 64 rows
        assert loads, name
        # Nothing waits for a load from global memory before the products: it is of the next step's scale of a block.
        assert set(loop[: loop.index("WGMMA")]) <= {"LOAD"}, (name, loop)
        after = loop[waits[-1] + 1 :]
        assert set(after) == {"RELEASE", "FFMA"}, (name, after)
        assert not {"SPILL", "FENCE", "BARRIER"} & set(loop), name


@pytest.mark.aot
@pytest.mark.parametrize(
    ("target", "operations"),
    # A v5p has no products in FP8, so these kernels are other programs there.
    [("v6e", OPERATIONS), ("v5p", ("blockwise_matmul", "grouped_matmul"))],
)
def test_tpu_kernels_compile(target, operations):
    cases = [case for operation in compiled(target, operations).values() for case in operation]
    assert len(cases) >= 7
    assert all(case["program_bytes"] > 0 for case in cases)


def test_missing_compilers_are_named(monkeypatch):
    monkeypatch.setattr(compile_ahead.importlib.util, "find_spec", lambda name: None)
    assert "install the extra 'aot'" in compile_ahead.why_unavailable("hopper")
    assert "libtpu" in compile_ahead.why_unavailable("v6e")
    monkeypatch.setattr(compile_ahead.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(compile_ahead.shutil, "which", lambda name: None)
    assert "ptxas is not on PATH" in compile_ahead.why_unavailable("hopper")
    assert compile_ahead.main(["hopper", "quantize"]) == 2
