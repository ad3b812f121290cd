"""Checks that the benchmark finds wrong results and keeps tuning entries, and the emulated tensor core's sums."""

import importlib
import pathlib
import runpy
import sys

import jax
import numpy as np
import pytest

EXPERIMENTS = pathlib.Path(__file__).parents[2] / "experiments"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS / "benchmarks"))
    yield importlib.import_module("kernels")
    for name in ("kernels", "kernel_problems", "grouped_problems", "routing_problems", "device_timing"):
        sys.modules.pop(name, None)


def test_every_family_is_checked_and_a_wrong_result_is_seen(benchmark):
    """Takes one problem per family, and each operation of families that have several."""
    seen = set()
    for problem in benchmark.problems(list(benchmark.FAMILIES), sanity=True):
        several = problem.family in ("quantise", "routing")
        kind = problem.family, problem.name.split(",")[0] if several else ""
        if kind in seen:
            continue
        seen.add(kind)
        inputs = problem.make(jax.random.key(0))
        ours = problem.contenders[benchmark.OURS]
        out = ours.function(*(inputs[name] for name in ours.inputs))
        inputs, out = jax.device_get((inputs, out))
        assert problem.error(inputs, out) <= problem.tolerance, problem.name
        wrong = jax.tree.map(lambda x: x * 1.2 if x.dtype.kind in "fV" and x.dtype.itemsize > 1 else x, out)
        assert problem.error(inputs, wrong) > problem.tolerance, problem.name
    assert {family for family, _ in seen} == set(benchmark.FAMILIES)


def test_tuning_entries_survive_a_round_trip(benchmark, monkeypatch, tmp_path):
    from pallas_kernels.blockwise_matmul import tuning
    from pallas_kernels.grouped_matmul import tiling

    found = {
        tuning: {
            (4096, 2112, 7168): tuning.Tiling(tile_n=192, cluster=2),
            (64, 128, 256): tuning.Tiling(stages=3),
        },
        tiling: {
            ("rows fp8", 4096, 7168, 32): tiling.Tiling(128, 5, 2),
            ("depth fp8", 7168, 4096, 8): tiling.Tiling(64, 3),
        },
    }
    for module, entries in found.items():
        copy = tmp_path / pathlib.Path(module.__file__).name
        copy.write_text(pathlib.Path(module.__file__).read_text())
        monkeypatch.setattr(module, "__file__", str(copy))
        benchmark.write_tuning(module, entries)
        benchmark.write_tuning(module, entries)
        written = runpy.run_path(str(copy))["TUNED"]
        assert {key: repr(value) for key, value in written.items()} == {k: repr(v) for k, v in entries.items()}


def test_the_emulated_tensor_core_sums_as_described(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    script = runpy.run_path(str(EXPERIMENTS / "fp8_numerics.py"))
    rng = np.random.default_rng(0)
    products = rng.integers(1, 1000, size=(4096, 64)).astype("f8")
    exact = products.sum(axis=0)
    total = script["tensor_core_sum"]
    np.testing.assert_allclose(total(products, None, bits=50), exact, rtol=1e-6)
    unpromoted = np.abs(total(products, None) - exact) / exact
    promoted = np.abs(total(products, 128) - exact) / exact
    assert unpromoted.max() > 0.01
    assert promoted.max() < 128 / 32 * 33 * 2**-14  # each of four steps cuts off at most one unit per term
