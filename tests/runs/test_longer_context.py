"""Checks that a run can extend the context of the model that it starts from (report section 4.3)."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
from flax import nnx
from small_models import small_model
from small_runs import assert_trees_equal, small_run

from dsv3_jax.cli.main import main
from dsv3_jax.config import ModelConfig, RopeScaling
from dsv3_jax.errors import ConfigError, UserError
from dsv3_jax.runs import loop, starting_point
from dsv3_jax.runs.starting_state import starting_state
from dsv3_jax.training.state_layout import StateLayout


def test_the_reports_extension() -> None:
    """Training at 4K, then s = 40 for both phases; the published context is 163,840."""
    short = ModelConfig.preset("v3-671b").replace(max_position_embeddings=4096, rope_scaling=None)
    long = short.with_context_factor(40)
    assert long.rope_scaling == RopeScaling(factor=40.0, original_max_position_embeddings=4096)
    assert long.max_position_embeddings == 163_840
    assert long.with_context_factor(40) == long
    assert long.replace(max_position_embeddings=4096, rope_scaling=None) == short
    for factor in (0.5, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="factor of the context"):
            short.with_context_factor(factor)


def test_the_weights_of_a_shorter_context_are_used_at_the_new_positions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = small_run()
    short, long = run.model, run.model.with_context_factor(4)
    monkeypatch.setattr(starting_point, "architecture_of_source", lambda source: short)
    monkeypatch.setattr("dsv3_jax.interop.load_hf", lambda *_, **__: small_model(short, 3))
    config = dataclasses.replace(run, model=long)
    skeleton, state = starting_state(
        config, StateLayout(), functools.partial(starting_point.load_starting_point, tmp_path, config)
    )
    model = skeleton.model(state.params, state.router_biases)
    assert model.config == model.moe_blocks.attention.config == long
    assert_trees_equal(nnx.state(model, nnx.Param), nnx.state(small_model(short, 3), nnx.Param))
    other = dataclasses.replace(config, model=long.replace(num_attention_heads=2 * long.num_attention_heads))
    with pytest.raises(UserError, match="num_attention_heads"):
        starting_point.load_starting_point(tmp_path, other, StateLayout().devices)


def test_the_option_of_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[Any] = []
    monkeypatch.setattr(loop, "train", lambda config, *_, **__: given.append(config) or loop.Outcome(0))
    words = ["train", "--preset", "tiny", "--out", str(tmp_path / "run"), "--context-factor", "4"]
    assert main([*words, "--data.sequence-length", "512"]) == 0
    assert given[0].model == ModelConfig.preset("tiny").with_context_factor(4)
    assert main([*words, "--data.sequence-length", "513"]) == 2
