"""Models whose weights stay in FP8 as published: text, and a training step that leaves those weights alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interop.checkpoints import fp8_checkpoint
from simulated import run_simulated
from small_runs import SETTINGS, random_batch, small_run

import dsv3_jax as dsv3
from dsv3_jax.interop.parameter_tree import arrays
from dsv3_jax.precision import Precision
from dsv3_jax.precision.fp8_weight import Fp8Weight
from dsv3_jax.training.state import new_state
from dsv3_jax.training.step import make_train_step

pytestmark = pytest.mark.slow


def loaded(folder: Path, recipe: str, **options: object) -> dsv3.DeepSeekV3:
    """The checkpoint under a recipe; masters are float32 where FP8 is not kept."""
    return dsv3.load_hf(folder, dtype="float32", precision=Precision.preset(recipe), **options)  # pyright: ignore


@pytest.mark.parametrize(("recipe", "rows"), [("float32", 1), ("bfloat16", 4), ("fp8", 1), ("fp8", 4)])
def test_greedy_text_is_that_of_the_dequantized_model(tmp_path: Path, recipe: str, rows: int) -> None:
    """One row reads a few experts in place; four rows choose more experts than there are and are sorted by expert."""
    folder = fp8_checkpoint(tmp_path, "v3_yarn_small", scale=2.0**-10)
    prompt = jnp.asarray(np.random.default_rng(0).integers(2, 256, (rows, 5)), jnp.int32)
    kept, plain = (loaded(folder, recipe, keep_fp8=keep) for keep in (True, False))
    assert isinstance(arrays(kept)["moe_blocks.feed_forward.experts.gate_up"], Fp8Weight)
    np.testing.assert_array_equal(dsv3.generate(kept, prompt, 16), dsv3.generate(plain, prompt, 16))


@pytest.mark.parametrize("recipe", ["float32", "fp8"])
def test_a_training_step_moves_all_but_the_kept_weights(tmp_path: Path, recipe: str) -> None:
    """The other parameters move as in the dequantized model; the kept ones stay bit for bit and have no moments."""
    folder = fp8_checkpoint(tmp_path, "v3_yarn_small")
    batch = random_batch(0, 2, 2)
    batch = batch[0] % 256, batch[1]
    after = {}
    for keep in (True, False):
        model = loaded(folder, recipe, keep_fp8=keep)
        before = {path: jax.tree.map(np.asarray, value) for path, value in arrays(model).items()}
        # No clipping: the norm of the gradient is over the parameters that are trained.
        run = small_run(ema_decay=0.9, gradient_clip=1e9)
        config = dataclasses.replace(run, model=model.config, precision=recipe)
        skeleton, state = new_state(model, config)
        state, metrics = make_train_step(skeleton, config)(state, *batch, SETTINGS)
        assert bool(metrics.applied)
        model = skeleton.model(state.params, state.router_biases)
        after[keep] = before, arrays(model), float(metrics.loss), state
    before, values, loss, state = after[True]
    _, plain, plain_loss, plain_state = after[False]
    rounding = 1e-5 if recipe == "float32" else 2e-2
    assert loss == pytest.approx(plain_loss, rel=rounding)
    frozen = {path for path, value in before.items() if isinstance(value, Fp8Weight)}
    assert any("experts" in path for path in frozen)
    for path in before:
        if path in frozen:
            np.testing.assert_array_equal(
                np.asarray(values[path].values).view(np.uint8), before[path].values.view(np.uint8)
            )
            np.testing.assert_array_equal(values[path].scales, before[path].scales)
        elif recipe == "float32":
            moved = np.asarray(values[path]) - before[path]
            assert np.abs(moved).max() > 0, path
            np.testing.assert_allclose(values[path], plain[path], rtol=0, atol=1e-4, err_msg=path)
        else:
            assert np.abs(np.asarray(values[path]) - before[path]).max() > 0, path
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.optimizer))
    everything = sum(leaf.size for leaf in jax.tree.leaves(plain_state.optimizer))
    assert moments == everything - 2 * sum(before[path].size for path in frozen)
    assert jax.tree.structure(state.average) == jax.tree.structure(state.params)


@pytest.mark.slow
def test_logits_on_a_mesh_are_those_of_the_dequantized_model(tmp_path: Path) -> None:
    """Requantizing these weights gives their scales again, so the FP8 recipe multiplies by the same tiles."""
    folder = fp8_checkpoint(tmp_path, "v3_yarn_small", scale=2.0**-10)
    script = Path(__file__).with_name("simulated_kept_fp8.py")
    errors = run_simulated(script, str(folder), "fsdp=2,expert=4", "fp8")
    assert errors == {"fp8": 0.0}
