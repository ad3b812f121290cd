"""Checks what plans say of the exchange of tokens with their experts, by hand and against what ranks send."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from dsv3_jax.config import ModelConfig
from dsv3_jax.planning.config import PlanConfig
from dsv3_jax.planning.exchange import TokenExchange
from dsv3_jax.planning.hardware import Target
from dsv3_jax.planning.plan import make_plan
from dsv3_jax.sharding.mesh import MeshConfig

V3 = ModelConfig.preset("v3-671b")


def plan_config(expert: int, target: str = "h800:64") -> PlanConfig:
    return PlanConfig(model=V3, target=Target.parse(target), mesh=MeshConfig(fsdp=-1, expert=expert), batch_size=0)


def test_passes_over_buffers_by_hand() -> None:
    """Checks bytes for 2,048 and 3,072 rows a piece; backward, float32 gradients of four experts are zeroed once."""
    rows = (2048 + 3072) * 7168 * 2
    for precision, forward, backward in (("bfloat16", 10, 20), ("fp8", 9, 15), ("fp8,dispatch=false", 10, 20)):
        exchange = TokenExchange.of(dataclasses.replace(plan_config(64), precision=precision))
        assert exchange.moved(backward=False) == 16 * forward * rows
        assert exchange.moved(backward=True) == 16 * backward * rows + 4 * 4 * 3 * 7168 * 2048


def test_experts_on_every_rank_need_no_exchange() -> None:
    exchange = TokenExchange.of(plan_config(1))
    assert (exchange.hops, exchange.rows, exchange.pieces) == ((), (), 1)
    assert exchange.moved(backward=True) == 0
    assert make_plan(plan_config(1)).expected.exchange == 0


def test_the_exchange_is_part_of_the_step() -> None:
    plan = make_plan(plan_config(64))
    exchange, bandwidth = TokenExchange.of(plan.config), plan.config.target.accelerator.bandwidth
    layers = plan.config.passes * (58 + 1)
    moved = layers * (exchange.moved(backward=False) + exchange.moved(backward=True))
    assert plan.bound.exchange == pytest.approx(moved / bandwidth)
    assert plan.bound.total > plan.bound.exchange > 0


@pytest.mark.parametrize(("part", "products"), [("forward", 1), ("backward", 2 + 2 / 3)])
def test_passes_are_as_many_as_in_the_compiled_program(part: str, products: int) -> None:
    """The time line of the step that was compiled for the report's mesh: products of experts, and passes around them.

    Backward two of three products are computed again, with two gradients of each.
    """
    folder = Path(__file__).parents[2] / "experiments/results/plans/h800-2048-v3-671b-dualpipe-fp8"
    spans = json.loads((folder / "plan.json").read_text())["compiled"]["pair"]
    experts = [span for span in spans if span["what"] == f"routed experts, {part}" and span["lane"] == "computation"]
    found = sum(span["end"] - span["start"] for span in experts)
    config = dataclasses.replace(plan_config(64), precision="fp8")
    exchange, accelerator = TokenExchange.of(config), config.target.accelerator
    moved = exchange.moved(backward=part == "backward") / (accelerator.bandwidth * accelerator.bandwidth_reached)
    operations = 2 * 3 * 7168 * 2048 * 8 * 4096
    computed = products * operations / (accelerator.fp8_flops * accelerator.fp8_reached)
    assert moved + computed == pytest.approx(found, rel=0.1)
