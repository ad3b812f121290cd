"""Gradients through pipelines equal to one device's, and what is refused before anything is compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from jax.sharding import AbstractMesh
from simulated import run_simulated

from dsv3_jax.config import ModelConfig
from dsv3_jax.data import DataConfig
from dsv3_jax.errors import ConfigError
from dsv3_jax.pipeline.passes import make_pipelined_pass
from dsv3_jax.sharding.mesh import AXES, MeshConfig
from dsv3_jax.training.config import RunConfig, TrainingConfig


def test_pipelines_on_eight_devices_equal_one_device() -> None:
    """Layers that do not divide evenly, a dense layer, MTP, padding, fewer passes than DualPipe wants."""
    results = run_simulated(Path(__file__).with_name("simulated_pipelines.py"), JAX_ENABLE_X64="1")
    chains = results.pop("chains")
    assert set(chains) == {"1f1b", "zb1p", "dualpipe"}
    assert max(value for found in chains.values() for value in found) < 1e-12, chains
    assert len(results) == 1
    for case, found in results.items():
        assert found["load"], case
        assert max(found["terms"].values()) < TOLERANCE, (case, found["terms"])
        worst = max(found["gradients"], key=found["gradients"].get)
        assert found["gradients"][worst] < TOLERANCE, (case, worst, found["gradients"][worst])


# Sums of float64 in another order; some gradients are small differences of large terms. RoPE's angles and the balance
# statistics' weights are float32 everywhere and add nothing, since both sides share them.
TOLERANCE = 1e-9


def run(passes: int, **model: Any) -> RunConfig:
    config = ModelConfig.preset("tiny", **model)
    return RunConfig(
        preset="",
        model=config,
        data=DataConfig(sequence_length=16, vocab_size=config.vocab_size),
        training=TrainingConfig(batch_size=2 * passes, micro_batch_size=2),
        precision="float32",
    )


@pytest.mark.parametrize(
    ("stages", "schedule", "passes", "layers", "message"),
    [
        (4, "1f1b", 8, 4, r"mesh.stage \(4\) must not exceed the model's 3 MoE layers.* use 3 or fewer"),
        (3, "dualpipe", 8, 7, r"even number of stages, not 3; use 2 or 4"),
        (4, "dualpipe", 6, 7, r"micro_batch_size \(2\) cuts a batch of 12 into 6 micro-batches.* use 1$"),
        (4, "zb1p", 3, 7, r"micro_batch_size \(2\) cuts a batch of 6 into 3 micro-batches.* use 1$"),
        (4, "zb1p", 1, 7, r"into 1 micro-batches.* use a batch of 8$"),
        (4, "dualpipe", 9, 7, r"a batch of 18 into 9 micro-batches.* use 1$"),
    ],
    ids=["stages", "odd", "dualpipe passes", "zb1p passes", "batch", "odd passes"],
)
def test_what_cannot_be_placed_is_said_at_once(
    stages: int, schedule: Any, passes: int, layers: int, message: str
) -> None:
    mesh: Any = AbstractMesh(tuple(MeshConfig(stage=stages).sizes.values()), AXES)
    config = run(passes, num_hidden_layers=layers, first_k_dense_replace=1)
    with pytest.raises(ConfigError, match=message):
        make_pipelined_pass(None, config, mesh, schedule)  # pyright: ignore[reportArgumentType]
