"""Experts on several devices equal to one: on a mesh, and inside the stages of a pipeline; and what travels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from simulated import run_simulated

from dsv3_jax.precision import Precision
from dsv3_jax.precision.dispatch import DispatchFormat, dispatch_formats
from dsv3_jax.sharding.expert_layout import HopRanks, hops_between

TOLERANCE = 1e-5  # of float32 sums in another order


def on_eight_devices(script: str) -> dict[str, Any]:
    """What the script beside this file prints."""
    return run_simulated(Path(__file__).with_name(script))


def test_experts_on_eight_devices_equal_one() -> None:
    """Output, load and every gradient: up to the order of float32 sums, which the load must not feel at all."""
    results = on_eight_devices("simulated_experts.py")
    assert len(results) == 2
    for mesh, found in results.items():
        assert found["load"], mesh
        assert found["uneven"] > 1.5
        assert found["output"] < TOLERANCE, mesh
        assert found["gradient"] < TOLERANCE, mesh


def test_experts_inside_the_stages_of_a_pipeline() -> None:
    """Each stage its own branch, of which only one exchanges tokens: nobody waits for another stage."""
    found = on_eight_devices("simulated_stage_experts.py")
    assert found["load"]
    assert found["output"] < TOLERANCE
    assert found["gradient"] < TOLERANCE


@pytest.fixture(scope="module")
def traffic() -> dict[str, Any]:
    return on_eight_devices("simulated_expert_traffic.py")


def test_a_token_crosses_once_to_each_of_its_groups(traffic: dict[str, Any]) -> None:
    """As many rows leave their group as the routing has other groups for its tokens: two at most, not one an expert."""
    found = traffic["crossings"]
    assert found["there and back"] == found["asked for"] <= 2 * 2 * found["tokens"]
    assert found["a row an expert"] > 1.5 * found["asked for"]


def test_tokens_and_gradients_travel_in_fp8(traffic: dict[str, Any]) -> None:
    """Rounded before they move as one device rounds them; results come back, forward and backward, as they are."""
    found = traffic["fp8"]
    assert found["apart"] < TOLERANCE
    assert found["rounding"] > 100 * TOLERANCE  # of the gradients that travel
    # On each of two hops: there, there anew, and the gradient of the way back; back twice, and gradients of tokens.
    assert found["moved"] == {"float8_e4m3fn": 2 * 3, "float32": 2 * 3}


def test_halves_do_not_wait_for_each_other(traffic: dict[str, Any]) -> None:
    """Forward and backward: of what one half exchanges nothing needs what the other does."""
    assert traffic["halves"] == sorted(2 * traffic["whole"])
    assert max(traffic["whole"]) > 5


@pytest.mark.parametrize(
    ("ranks", "groups", "hops"),
    [
        (64, 8, [(8, 8, 4), (8, 1, None)]),  # the report's: a group is a node
        (8, 8, [(8, 1, 4)]),
        (4, 8, [(4, 1, 4)]),
        (64, 1, [(64, 1, None)]),
        (1, 8, []),
        (6, 4, [(6, 1, None)]),  # a rank has a part of one group and all of another
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_hops(ranks: int, groups: int, hops: list[tuple[int, int, int | None]]) -> None:
    found = hops_between(ranks, groups, 4)
    assert [(hop.peers, hop.stride, hop.reached) for hop in found] == hops


def test_peers_have_the_same_place_in_their_groups() -> None:
    assert HopRanks(ranks=8, peers=4, stride=2).groups == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert HopRanks(ranks=8, peers=2).groups == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert HopRanks(ranks=8, peers=8).groups is None


@pytest.mark.parametrize(
    ("recipe", "tokens", "gradients"),
    [
        ("bfloat16", None, None),
        ("fp8", DispatchFormat(128, "e4m3"), DispatchFormat(128, "e4m3")),
        ("fp8,dispatch=false", None, None),
        ("fp8,tile=0", None, None),
        ("fp8,tile=32,input_gradient=e5m2", DispatchFormat(32, "e4m3"), DispatchFormat(32, "e5m2")),
        ("fp8,forward=none", None, DispatchFormat(128, "e4m3")),
        ("fp8,block_wise_gradients=true", DispatchFormat(128, "e4m3"), None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_recipe_says_of_travelling(
    recipe: str, tokens: DispatchFormat | None, gradients: DispatchFormat | None
) -> None:
    assert dispatch_formats(Precision.preset(recipe).fp8) == (tokens, gradients)
