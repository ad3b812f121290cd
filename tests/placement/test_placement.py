"""Checks the balancer against its published example, its exact properties, and brute force on small cases."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

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
# The published placements end in 8, 3, 1, 1 and in 8, 8, 9, 7, with two copies of an expert on one device.
GLOBAL = [
    [10, 6, 10, 7, 0, 2, 11, 4, 5, 9, 5, 4, 8, 1, 1, 3],
    [1, 10, 2, 4, 5, 11, 5, 0, 6, 7, 6, 3, 8, 7, 9, 8],
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


def even_packings(items: tuple[int, ...], size: int) -> Iterator[list[tuple[int, ...]]]:
    """Yields every way to divide items into packs of `size`."""
    if not items:
        yield []
        return
    for rest in itertools.combinations(items[1:], size - 1):
        pack_ = (items[0], *rest)
        for others in even_packings(tuple(item for item in items if item not in pack_), size):
            yield [pack_, *others]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=12, max_size=12), st.sampled_from([2, 3, 4, 6]))
def test_packing_is_heaviest_first_into_the_lightest(weights, packs):
    """Compares with the rule item by item."""
    weights = np.array(weights, float)
    found = pack(weights, packs)
    wanted: list[list[int]] = [[] for _ in range(packs)]
    for item in sorted(range(12), key=lambda item: (-weights[item], item)):
        loads = [weights[members].sum() if len(members) < 12 // packs else np.inf for members in wanted]
        wanted[loads.index(min(loads))].append(item)
    assert found == wanted


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_copies_of_an_expert_are_on_different_devices(data):
    """Takes 8 copies of 3 to 8 experts: apart wherever no expert has more copies than there are devices.

    The heaviest device is then at most a third heavier than in the best of all such placements, found by trying all.
    """
    packs = data.draw(st.sampled_from([2, 4]))
    counts = data.draw(st.lists(st.integers(1, packs), min_size=3, max_size=8).filter(lambda counts: sum(counts) >= 8))
    kinds = np.repeat(np.arange(len(counts)), counts)[:8]
    loads = np.array(data.draw(st.lists(st.integers(0, 30), min_size=len(counts), max_size=len(counts))), float)
    weights = (loads / np.maximum(np.bincount(kinds, minlength=len(counts)), 1))[kinds]
    found = pack(weights, packs, kinds)
    assert sorted(itertools.chain(*found)) == list(range(8))
    for members in found:
        assert len(set(kinds[members])) == len(members) == 8 // packs
    best = min(
        max(weights[list(members)].sum() for members in packing)
        for packing in even_packings(tuple(range(8)), 8 // packs)
        if all(len(set(kinds[list(members)])) == len(members) for members in packing)
    )
    assert max(weights[members].sum() for members in found) <= 4 / 3 * best + 1e-9


@pytest.mark.parametrize(("groups", "nodes"), [(8, 4), (1, 1)], ids=["hierarchical", "global"])
def test_copies_are_apart_at_the_reports_size_and_loads_no_worse(groups, nodes):
    """Places 256 + 32 experts on 32 devices; the oracle is the published greedy rule, which repeats experts."""
    load = np.random.default_rng(0).lognormal(0, 1, (6, 256))
    placement = place_experts(load, physical=288, devices=32, groups=groups, nodes=nodes)
    for layer, row in enumerate(placement.logical):
        assert all(len(set(device)) == 9 for device in row.reshape(32, 9))
        assert placement.counts[layer].max() <= 32 // nodes
        members = np.arange(256).reshape(groups, -1)
        greedy = 0.0
        for of_node in pack(load[layer].reshape(groups, -1).sum(axis=1), nodes):
            experts = members[of_node].reshape(-1)
            copies = replicate(load[layer][experts], 288 // nodes)
            each = (load[layer][experts] / np.bincount(copies))[copies]
            greedy = max(greedy, *(each[device].sum() for device in pack(each, 32 // nodes)))
        assert placement.device_loads(load)[layer].max() <= greedy * (1 + 1e-12)


def test_more_copies_than_devices_are_spread_evenly():
    """One expert with 4 slots on each of 2 devices cannot be apart; of two experts each gets one slot per device."""
    placement = place_experts(np.array([[5.0]]), physical=8, devices=2)
    assert placement.logical.tolist() == [[0] * 8]
    placement = place_experts(np.array([[9.0, 1.0]]), physical=4, devices=2)
    assert [sorted(device) for device in placement.logical[0].reshape(2, 2)] == [[0, 1], [0, 1]]


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
