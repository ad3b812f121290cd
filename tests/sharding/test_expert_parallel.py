"""Checks experts on several devices against one device, on a mesh and inside pipeline stages, and what they send."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from simulated import run_simulated

from dsv3_jax.precision import Precision
from dsv3_jax.precision.dispatch import DispatchFormat, dispatch_formats
from dsv3_jax.sharding.expert_layout import HopRanks, hops_between, pieces_of, rows_of_block, rows_per_sender

TOLERANCE = 1e-5  # relative error of float32 sums in another order


def on_eight_devices(script: str) -> dict[str, Any]:
    """Returns the JSON that a script of this folder prints."""
    return run_simulated(Path(__file__).with_name(script))


@pytest.mark.slow
def test_experts_on_eight_devices_equal_one() -> None:
    """Output and gradients agree up to the order of float32 sums; the load is equal."""
    results = on_eight_devices("simulated_experts.py")
    assert len(results) == 2
    for mesh, found in results.items():
        assert found["load"], mesh
        assert found["uneven"] > 1.5
        assert found["output"] < TOLERANCE, mesh
        assert found["gradient"] < TOLERANCE, mesh


@pytest.mark.slow
def test_experts_inside_the_stages_of_a_pipeline() -> None:
    """Stages take different branches, of which only one exchanges tokens, and no stage waits for another."""
    found = on_eight_devices("simulated_stage_experts.py")
    assert found["load"]
    assert found["output"] < TOLERANCE
    assert found["gradient"] < TOLERANCE


@pytest.fixture(scope="module")
def traffic() -> dict[str, Any]:
    return on_eight_devices("simulated_expert_traffic.py")


@pytest.mark.slow
def test_a_token_crosses_once_to_each_of_its_groups(traffic: dict[str, Any]) -> None:
    """A token's row is sent once to each other group that the routing chose, two at most, and not once per expert."""
    found = traffic["crossings"]
    assert found["there and back"] == found["asked for"] <= 2 * 2 * found["tokens"]
    assert found["one row per expert"] > 1.5 * found["asked for"]


@pytest.mark.slow
def test_tokens_and_gradients_are_sent_in_fp8(traffic: dict[str, Any]) -> None:
    """They are rounded before dispatch as on one device; combined results are sent unrounded, forward and backward."""
    found = traffic["fp8"]
    assert found["apart"] < TOLERANCE
    assert found["rounding"] > 100 * TOLERANCE  # error by rounding the gradients that are sent
    # On each of two hops, FP8: dispatch, its recomputation, and the gradient of combine. Float32: combine, its
    # recomputation, and the gradient of dispatch. In a further round of the second hop one recomputation more.
    assert found["moved"] == {"float8_e4m3fn": 2 * 3 + 4, "float32": 2 * 3 + 4}


@pytest.mark.slow
def test_stages_in_fp8_equal_one_device(traffic: dict[str, Any]) -> None:
    """Where weight gradients are in FP8 too, their tiles are of other rows, so that they are rounded otherwise."""
    assert traffic["fp8 in stages"] < TOLERANCE
    assert traffic["report's recipe in stages"] < 0.05


@pytest.mark.slow
def test_stages_do_not_wait_for_each_other(traffic: dict[str, Any]) -> None:
    """In an iteration no exchange of rows, forward or backward, waits for another or for a product."""
    assert len(traffic["stages"]) > 10
    assert not any(traffic["stages"])
    assert max(traffic["whole"]) > 5


@pytest.mark.parametrize(
    ("ranks", "groups", "hops"),
    [
        (64, 8, [(8, 8, 4), (8, 1, None)]),  # the report's layout, where a group is a node
        (8, 8, [(8, 1, 4)]),
        (4, 8, [(4, 1, 4)]),
        (64, 1, [(64, 1, None)]),
        (1, 8, []),
        (6, 4, [(6, 1, None)]),  # a rank has a part of one group and all of another one
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_hops(ranks: int, groups: int, hops: list[tuple[int, int, int | None]]) -> None:
    found = hops_between(ranks, groups, 4)
    assert [(hop.peers, hop.stride, hop.reached) for hop in found] == hops


def test_peers_have_the_same_index_in_their_groups() -> None:
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
def test_formats_of_dispatch_follow_the_recipe(
    recipe: str, tokens: DispatchFormat | None, gradients: DispatchFormat | None
) -> None:
    assert dispatch_formats(Precision.preset(recipe).fp8) == (tokens, gradients)


@pytest.mark.parametrize(
    ("ranks", "groups", "expected"),
    [
        (64, 8, [256, 384]),  # 8 rows of 256 tokens reach a rank of the second hop's 8 peers, half of them from each
        (8, 8, [192]),  # at most four of a token's copies, over 8 ranks
        (64, 1, [48]),
        (2, 2, [256]),  # no rank can send more than its tokens
    ],
)
def test_memory_of_an_exchange_is_for_a_little_more_than_an_even_load(ranks: int, groups: int, expected: Any) -> None:
    hops = hops_between(ranks, groups, 4)
    assert rows_per_sender(hops, tokens=256, chosen=8) == expected
    few = rows_per_sender(hops, tokens=2, chosen=8)
    assert few[-1] == min(16, 2 * ranks // hops[-1].peers)  # of few tokens any part may be for one rank


def test_a_block_of_products_holds_an_even_load_with_its_padding() -> None:
    assert rows_of_block(4096, 4, 128) == 5120 + 4 * 128
    assert rows_of_block(16, 4, 128) == 5 * 128
    assert rows_of_block(12, 4, 1) == 15 + 4


def test_pieces_divide_the_tokens() -> None:
    assert [pieces_of(tokens, hops=2) for tokens in (4096, 17, 7)] == [16, 17, 7]
