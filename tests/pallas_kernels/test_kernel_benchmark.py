"""The benchmark's checks find wrong results; its tuning entries survive a round trip; the numerics script sums."""

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
    for name in ("kernels", "kernel_problems", "device_timing"):
        sys.modules.pop(name, None)


def test_every_family_is_checked_and_a_wrong_result_is_seen(benchmark):
    seen = set()
    for problem in benchmark.problems(list(benchmark.FAMILIES), sanity=True):
        if problem.name.split(",")[0] in seen or (problem.family, problem.family) in seen:
            continue
        seen |= {problem.name.split(",")[0], (problem.family, problem.family) if problem.family != "routing" else ""}
        inputs = problem.make(jax.random.key(0))
        ours = problem.contenders[benchmark.OURS]
        out = ours.function(*(inputs[name] for name in ours.inputs))
        inputs, out = jax.device_get((inputs, out))
        assert problem.error(inputs, out) <= problem.tolerance, problem.name
        wrong = jax.tree.map(lambda x: x * 1.2 if x.dtype.kind in "fV" and x.dtype.itemsize > 1 else x, out)
        assert problem.error(inputs, wrong) > problem.tolerance, problem.name
    assert {family for family in benchmark.FAMILIES if (family, family) in seen} >= {"dense", "grouped", "quantise"}


def test_tuning_entries_survive_a_round_trip(benchmark, monkeypatch, tmp_path):
    from pallas_kernels.blockwise_matmul import tuning

    copy = tmp_path / "tuning.py"
    copy.write_text(pathlib.Path(tuning.__file__).read_text())
    monkeypatch.setattr(tuning, "__file__", str(copy))
    entries = {(4096, 2112, 7168): tuning.Tiling(tile_n=192, cluster=2), (64, 128, 256): tuning.Tiling(stages=3)}
    benchmark.write_tuning(entries)
    written = runpy.run_path(str(copy))["TUNED"]
    assert {key: repr(value) for key, value in written.items()} == {key: repr(v) for key, v in entries.items()}


def test_the_emulated_tensor_core_sums_as_described():
    script = runpy.run_path(str(EXPERIMENTS / "fp8_numerics.py"))
    rng = np.random.default_rng(0)
    products = rng.integers(1, 1000, size=(4096, 64)).astype("f8")
    exact = products.sum(axis=0)
    total = script["tensor_core_sum"]
    np.testing.assert_allclose(total(products, None, bits=50), exact, rtol=1e-6)
    unpromoted = np.abs(total(products, None) - exact) / exact
    promoted = np.abs(total(products, 128) - exact) / exact
    assert unpromoted.max() > 0.01
    assert promoted.max() < 128 / 32 * 33 * 2**-14  # each of four steps cuts at most one unit a term
