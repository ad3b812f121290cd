"""Checks the balancer against its published example, its exact properties, and brute force on small cases."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.errors import ConfigError
from dsv3_jax.sharding.placement import pack, place_experts, replicate

LOADS = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)
HIERARCHICAL = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]
GLOBAL = [
    [10, 6, 10, 7, 0, 2, 11, 4, 5, 9, 5, 4, 8, 3, 1, 1],
    [1, 10, 2, 4, 5, 11, 5, 0, 6, 7, 6, 3, 8, 8, 9, 7],
]


@pytest.mark.parametrize(("groups", "expected"), [(4, HIERARCHICAL), (3, GLOBAL)])
def test_published_example(groups, expected):
    placement = place_experts(LOADS, physical=16, devices=8, groups=groups, nodes=2)
    assert placement.logical.tolist() == expected


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_exact_properties(data):
    nodes = data.draw(st.sampled_from([1, 2, 4]))
    groups = nodes * data.draw(st.integers(1, 2))
    devices = nodes * data.draw(st.integers(1, 3))
    experts = groups * data.draw(st.integers(1, 3))
    physical = devices * data.draw(st.integers(-(-experts // devices), -(-experts // devices) + 3))
    load = np.array([data.draw(st.lists(st.integers(0, 99), min_size=experts, max_size=experts)) for _ in range(2)])
    placement = place_experts(load, physical=physical, devices=devices, groups=groups, nodes=nodes)
    assert placement.logical.shape == (2, physical)
    assert (placement.counts >= 1).all()
    assert (placement.counts.sum(axis=1) == physical).all()
    np.testing.assert_allclose(placement.device_loads(load).sum(axis=1), load.sum(axis=1))
    for layer in range(2):
        for expert in range(experts):
            copies = placement.copies[layer, expert]
            assert sorted(copies[copies >= 0]) == np.flatnonzero(placement.logical[layer] == expert).tolist()
        node_of = np.arange(physical) // (physical // nodes)
        for group in range(groups):
            inside = placement.logical[layer] // (experts // groups) == group
            assert len(set(node_of[inside])) == 1


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=2, max_size=4), st.integers(0, 3))
def test_no_other_copies_have_a_smaller_largest_load(weights, extra):
    weights = np.array(weights, float)
    copies = replicate(weights, len(weights) + extra)
    best = min(
        (weights / (1 + np.bincount(np.array(chosen, int), minlength=len(weights)))).max()
        for chosen in itertools.combinations_with_replacement(range(len(weights)), extra)
    )
    assert (weights / np.bincount(copies)).max() == best


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=6, max_size=6), st.sampled_from([2, 3]))
def test_packing_near_the_best(weights, packs):
    weights = np.array(weights, float)
    found = pack(weights, packs)
    assert sorted(itertools.chain(*found)) == list(range(6))
    assert {len(members) for members in found} == {6 // packs}
    best = min(
        weights[np.array(order)].reshape(packs, -1).sum(axis=1).max() for order in itertools.permutations(range(6))
    )
    # By the rule itself, written out: the heaviest item that is left joins the lightest pack that is not full.
    left, packed = sorted(range(6), key=lambda item: (-weights[item], item)), [[] for _ in range(packs)]
    for item in left:
        free = [members for members in packed if len(members) < 6 // packs]
        min(free, key=lambda members: sum(weights[m] for m in members)).append(item)
    assert found == packed
    assert best <= max(weights[members].sum() for members in found) <= best + weights.max() / 2


def test_packing_is_the_best_where_pairs_fit():
    """Heaviest with lightest: 9 + 1, 8 + 2 and 7 + 3 are equal."""
    found = pack(np.array([1.0, 9, 2, 8, 3, 7]), 3)
    assert sorted(sorted(members) for members in found) == [[0, 1], [2, 3], [4, 5]]


def test_redundant_experts_even_out_skewed_loads():
    load = np.random.default_rng(0).zipf(1.5, (3, 32)).clip(max=50).astype(float)
    plain = load.reshape(3, 8, 4).sum(axis=2)
    placed = place_experts(load, physical=40, devices=8, groups=4, nodes=1)
    assert (placed.imbalance(load) < plain.max(axis=1) / plain.mean(axis=1)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"physical": 8, "devices": 4}, "cannot hold"),
        ({"physical": 14, "devices": 4}, "devices"),
        ({"physical": 16, "devices": 8, "nodes": 3}, "nodes"),
        ({"physical": 16, "devices": 8, "groups": 5}, "groups"),
    ],
)
def test_counts_that_do_not_divide_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        place_experts(LOADS, **options)


def test_invalid_loads_are_refused():
    with pytest.raises(ConfigError, match="finite"):
        place_experts(-LOADS, physical=16, devices=8)
