"""Checks that the needle grid counts what a model finds, and that the phases change nothing but positions."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture(scope="module")
def script():
    """Imports `long_context` with the import path that running it would have."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXPERIMENTS))
        yield importlib.import_module("long_context")
    for name in set(sys.modules) - before:
        if (EXPERIMENTS / f"{name}.py").exists():
            del sys.modules[name]


def plan_of(script: ModuleType, tmp_path: Path) -> Any:
    options = importlib.import_module("ablation").Options("long_context", "tiny", (0,), tmp_path, tmp_path, 0)
    return script.plan_of(options)


class Characters:
    """A tokenizer whose ids are the characters' codes."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


class ShortSighted(nnx.Module):
    """A model that finds the key's fact at most `reach` characters before the question, and answers "q" otherwise."""

    def __init__(self, reach: int) -> None:
        self.reach = reach

    def features(self, tokens: jax.Array) -> SimpleNamespace:
        place = jnp.arange(tokens.shape[1])
        is_fact = (tokens >= 33) & (tokens < 97)
        key, value = (tokens - 33) // 8, (tokens - 33) % 8
        gap = place[:, None] - place[None, :]
        seen = is_fact[:, None, :] & (key[:, None, :] == tokens[:, :, None] - 105) & (gap > 0) & (gap <= self.reach)
        answers = jnp.max(jnp.where(seen, 97 + value[:, None, :], ord("q")), axis=-1, where=seen, initial=0)
        return SimpleNamespace(hidden=100 * jax.nn.one_hot(jnp.where(answers > 0, answers, ord("q")), 128))

    def head(self, hidden: jax.Array) -> jax.Array:
        return hidden


@pytest.mark.parametrize("reach", [10, 50])
def test_the_grid_shows_how_far_a_model_sees(script: ModuleType, tmp_path: Path, reach: int):
    plan = dataclasses.replace(plan_of(script, tmp_path), lengths=(32, 64, 128), trials=3)
    assert plan.contexts == [16, 32, 64, 128]
    with jax.disable_jit():
        found = script.needle_scores(ShortSighted(reach), Characters(), plan)
    for column, context in enumerate(plan.contexts):
        for row, depth in enumerate(script.DEPTHS):
            distance = (context - 2) - depth * (context - 3)  # from the needle to its question
            if abs(distance - reach) > 2:  # the needle may stand a character earlier, and is rounded
                assert round(found[row, column], 6) == (1.0 if distance < reach else 0.0), (context, depth)


def test_phases_change_positions_alone_and_keep_the_tokens_of_a_step(script: ModuleType, tmp_path: Path):
    plan = plan_of(script, tmp_path)
    assert {length * batch for length, batch in zip(plan.lengths, plan.batches, strict=True)} == {1024}
    assert [plan.lengths[i + 1] / plan.lengths[i] for i in (0, 1)] == [32 / 4, 128 / 32]  # the report's phases
    before = plan.model.to_dict()
    for yarn, changed in ((True, {"rope_scaling", "max_position_embeddings"}), (False, {"max_position_embeddings"})):
        after = script.extended(plan.model, plan.lengths[0], yarn).to_dict()
        assert {name for name in before if before[name] != after[name]} == changed
        assert after["max_position_embeddings"] == 40 * plan.lengths[0] >= plan.lengths[2]


def test_phases_keep_the_last_learning_rate(script: ModuleType, tmp_path: Path):
    plan = plan_of(script, tmp_path)
    options = importlib.import_module("ablation").Options("long_context", "tiny", (0,), tmp_path, tmp_path, 0)
    (tmp_path / "corpus.jsonl").touch()
    for length in plan.lengths:
        (tmp_path / f"facts-{length}.jsonl").touch()
    first, second, third = (script.run_of_phase(options, plan, 0, phase, phase > 0) for phase in range(3))
    last = first.training.schedule.rate_at(1.0, 1.0)
    for run in (second, third):
        rates = {run.training.schedule.rate_at(progress, progress) for progress in (0.0, 0.3, 0.9, 0.999)}
        assert all(np.isclose(rate, last, rtol=1e-12) for rate in rates)
        assert run.model == second.model
