"""Checks the sums of the emulated tensor core."""

import pathlib
import runpy

import numpy as np

EXPERIMENTS = pathlib.Path(__file__).parents[2] / "experiments"


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
