"""Checks what all ranks of a pipeline exchange for the losses, on an axis of `jax.vmap` that stands for the stages."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.pipeline.predictions import sum_on_last_stages, to_all_stages
from dsv3_jax.pipeline.weights import rows_of_stages
from dsv3_jax.planning.weights import abstract_mesh
from dsv3_jax.sharding.mesh import MeshConfig

SIZES = [(1, 1), (2, 1), (2, 2), (4, 2), (5, 1)]
"""Ranks and directions."""


@pytest.mark.parametrize(("ranks", "directions"), SIZES)
@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 7), (3, 8, 1)])
def test_last_stages_reach_all_ranks_and_sums_reach_them(ranks: int, directions: int, shape: tuple[int, ...]) -> None:
    """Direction 0 ends on the last rank and direction 1 on the first; others' values must not count."""
    values = np.random.default_rng(0).normal(size=(ranks, *shape)).astype(np.float32)
    ends = [ranks - 1, 0][:directions]
    found = jax.vmap(functools.partial(to_all_stages, directions=directions), axis_name="stage")(jnp.asarray(values))
    for rank in range(ranks):
        np.testing.assert_array_equal(found[rank], np.concatenate([values[end] for end in ends]))

    given_back = np.random.default_rng(1).integers(-9, 9, (ranks, directions * shape[0], *shape[1:])).astype(np.float32)
    back = jax.vmap(functools.partial(sum_on_last_stages, directions=directions), axis_name="stage")(given_back)
    whole = given_back.sum(axis=0).reshape(directions, *shape)
    for rank in range(ranks):
        expected = whole[ends.index(rank)] if rank in ends else np.zeros(shape)
        np.testing.assert_array_equal(back[rank], expected)


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(1, 9), st.sampled_from([1, 2, 4]))
def test_rows_of_the_head_are_as_even_as_can_be(vocabulary: int, stages: int, tensor: int) -> None:
    """All rows, in equal numbers but for the last stages, which tensor ranks can divide if they divide the whole."""
    rows = rows_of_stages(vocabulary, abstract_mesh(MeshConfig(stage=stages, tensor=tensor)))
    assert sum(rows) == vocabulary
    assert len(rows) == stages
    assert list(rows) == sorted(rows, reverse=True)
    assert all(before == rows[0] or after == 0 for before, after in itertools.pairwise(rows))
    assert max(rows) - vocabulary / stages < tensor
    if vocabulary % tensor == 0:
        assert max(rows) % tensor == 0
