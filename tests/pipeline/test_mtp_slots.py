"""Checks where blocks of MTP modules are among a rank's layers, on an axis of `jax.vmap` that stands for the stages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from dsv3_jax.config import ModelConfig
from dsv3_jax.model import abstract_model
from dsv3_jax.pipeline.mtp_slots import (
    add_to_blocks,
    put_blocks,
    read_blocks,
    split_blocks,
    take_blocks,
    tree_of_blocks,
    with_slots,
)
from dsv3_jax.pipeline.slots import layer_slots, moe_layers_of_stages

RANKS, HELD = 3, 2
"""Stages, and how many slots their layers need."""


def numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(("first", "depths"), [(0, 1), (1, 1), (0, 2), (2, 1), (2, 2), (1, 2), (1, 0)])
def test_only_the_last_stage_holds_blocks_and_their_gradients(first: int, depths: int) -> None:
    """All other slots keep their layers, also where the last stage's own layers leave no slot empty."""
    slots = max(HELD, first + depths)
    layers = nnx.State({"a": numbers(0, RANKS, HELD, 4), "b": {"c": numbers(1, RANKS, HELD, 2, 3)}})
    blocks = [nnx.State({"a": numbers(2 + k, 4), "b": {"c": numbers(9 + k, 2, 3)}}) for k in range(depths)]

    def on_a_rank(layers: nnx.State) -> tuple[nnx.State, list[nnx.State], nnx.State, list[nnx.State]]:
        held = put_blocks(with_slots(layers, slots), blocks, first)
        added = add_to_blocks(held, [jax.tree.map(jnp.ones_like, block) for block in blocks], jnp.asarray(first))
        return held, read_blocks(held, blocks, jnp.asarray(first)), added, take_blocks(held, blocks, first)

    held, read, added, taken = jax.vmap(on_a_rank, axis_name="stage")(layers)
    leaves: list[Callable[[nnx.State], Any]] = [lambda tree: tree["a"], lambda tree: tree["b"]["c"]]
    for at in leaves:
        expected = np.zeros((RANKS, slots, *at(layers).shape[2:]), np.float32)
        expected[:, :HELD] = at(layers)
        for k, block in enumerate(blocks):
            expected[-1, first + k] = at(block)
            np.testing.assert_array_equal(at(taken[k])[-1], at(block))
            assert not at(taken[k])[:-1].any()
        np.testing.assert_array_equal(at(held), expected)
        for k in range(depths):
            np.testing.assert_array_equal(at(read[k]), expected[:, first + k])
            expected[:, first + k] += 1
        np.testing.assert_array_equal(at(added), expected)


def test_a_tree_of_parameters_is_split_and_joined() -> None:
    model = abstract_model(ModelConfig.preset("tiny", num_nextn_predict_layers=2))
    params = nnx.state(model, nnx.Param)
    others, blocks = split_blocks(params)
    assert len(blocks) == 2
    assert set(others["mtp"][1]) == {"embedding_norm", "hidden_norm", "projection", "output_norm"}
    joined = nnx.merge_state(others, tree_of_blocks(blocks))
    assert jax.tree.structure(joined) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(joined), jax.tree.leaves(params), strict=True))


@given(st.integers(1, 70), st.integers(0, 4), st.integers(1, 16), st.integers(0, 3))
def test_there_are_as_many_slots_as_any_stage_needs(layers: int, dense: int, stages: int, depths: int) -> None:
    model = ModelConfig.preset("tiny", num_hidden_layers=layers + dense, first_k_dense_replace=dense)
    held = moe_layers_of_stages(model, min(stages, layers))
    needed = [count + depths * (stage == len(held) - 1) for stage, count in enumerate(held)]
    assert layer_slots(held, depths) == max(needed)


def test_the_block_of_v3_needs_no_slot_more() -> None:
    """61 layers, 3 of them dense, on 16 stages: one MoE layer on the last, four on others."""
    held = moe_layers_of_stages(ModelConfig.preset("v3-671b"), 16)
    assert (held[-1], max(held), layer_slots(held, 1)) == (1, 4, 4)
