"""Checks that gradients through pipelines equal one device's, and what is refused before anything is compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from simulated import run_simulated

from dsv3_jax.errors import ConfigError
from dsv3_jax.pipeline.passes import check_passes

pytestmark = pytest.mark.slow


def test_pipelines_on_eight_devices_equal_one_device() -> None:
    """Covers layers that do not divide evenly, a dense layer, MTP, padding, fewer passes than DualPipe asks for.

    In FP8 a pipeline is compared with one whose stages keep master weights, which products round.
    """
    results = run_simulated(Path(__file__).with_name("simulated_pipelines.py"), JAX_ENABLE_X64="1")
    chains = results.pop("chains")
    assert set(chains) == {"1f1b", "zb1p", "dualpipe"}
    assert max(value for found in chains.values() for value in found) < 1e-12, chains
    assert len(results) == 3
    for case, found in results.items():
        tolerance = TOLERANCE["fp8" if "fp8" in case else "float64"]
        assert found["load"], case
        assert max(found["terms"].values()) < tolerance, (case, found["terms"])
        worst = max(found["gradients"], key=found["gradients"].get)
        assert found["gradients"][worst] < tolerance, (case, worst, found["gradients"][worst])


# Sums of float64 are in another order, and some gradients are small differences of large terms. RoPE's angles and the
# weights of the balance statistics are float32, but equal on both sides, so they add no error. A weight that is
# rounded to FP8 otherwise would change results by 1%.
TOLERANCE = {"float64": 1e-9, "fp8": 1e-5}


@pytest.mark.parametrize(
    ("stages", "schedule", "passes", "message"),
    [
        (3, "dualpipe", 8, r"even number of stages, not 3; use 2 or 4"),
        (4, "dualpipe", 6, r"micro_batch_size \(2\) cuts a batch of 12 into 6 micro-batches.* use 1$"),
        (4, "zb1p", 3, r"micro_batch_size \(2\) cuts a batch of 6 into 3 micro-batches.* use 1$"),
        (4, "zb1p", 1, r"into 1 micro-batches.* use a batch of 8$"),
        (4, "dualpipe", 9, r"a batch of 18 into 9 micro-batches.* use 1$"),
    ],
    ids=["odd", "dualpipe passes", "zb1p passes", "batch", "odd passes"],
)
def test_a_batch_that_the_schedule_cannot_run_is_refused(stages: int, schedule: Any, passes: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_passes(schedule, stages, batch_size=2 * passes, rows_per_pass=2)
