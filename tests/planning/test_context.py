"""Plans of long sequences: what fits where the tokens of a sequence are on several devices, and what these exchange."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from simulated import run_simulated

from dsv3_jax.cli.main import main
from dsv3_jax.config import ModelConfig
from dsv3_jax.planning.advice import advise
from dsv3_jax.planning.config import PlanConfig
from dsv3_jax.planning.hardware import Target
from dsv3_jax.planning.plan import Plan, make_plan
from dsv3_jax.planning.search import meshes
from dsv3_jax.planning.traffic import CONTEXT_EXCHANGE
from dsv3_jax.sharding.mesh import MeshConfig

LENGTH = 131_072
V3 = ModelConfig.preset("v3-671b")
MESHES = {1: "fsdp=32,expert=64", 4: "fsdp=8,context=4,expert=64", 16: "fsdp=2,context=16,expert=64"}


def plan_of(context: int) -> Plan:
    return make_plan(
        PlanConfig(
            model=V3,
            target=Target.parse("h800:2048"),
            mesh=MeshConfig.parse(MESHES[context]),
            sequence_length=LENGTH,
            precision="fp8",
            average="none",
        )
    )


def test_sequences_of_128k_fit_only_where_they_are_divided() -> None:
    plans = {context: plan_of(context) for context in MESHES}
    assert [plan.fits for plan in plans.values()] == [False, False, True]
    one, four = plans[1].activations, plans[4].activations
    # Where ranks send the outputs of their heads to others, logarithms of the heads' sums are not kept beside them.
    log_sums = (V3.num_hidden_layers + 1) * LENGTH * V3.num_attention_heads * 4
    assert sum(four.kept.values()) == pytest.approx((sum(one.kept.values()) - log_sums) / 4)
    assert plans[16].state.total < 1.05 * plans[1].state.total
    assert four.recomputed < one.recomputed / 3


def test_what_ranks_exchange_by_hand() -> None:
    """Forward and again for the backward pass 2,112 numbers of every token, outputs of all heads once; gradients."""
    (flow,) = (flow for flow in plan_of(4).flows if flow.what == CONTEXT_EXCHANGE)
    latents, outputs = LENGTH * (1536 + 512 + 64), LENGTH / 4 * 128 * 128
    assert flow.sent == pytest.approx(62 * 3 / 4 * 2 * (3 * latents + 2 * outputs))
    assert flow.between_nodes


def test_advice_divides_long_sequences_further() -> None:
    changes = [advice.change for advice in advise(plan_of(4))]
    assert any("--mesh.context 8" in change for change in changes)
    assert not any("--mesh.stage" in change for change in changes)


def test_a_search_divides_long_sequences_only() -> None:
    short, long = (set(meshes(V3, 16, length)) for length in (4096, LENGTH))
    assert {mesh.context for mesh in short} == {1}
    assert {mesh.context for mesh in long} == {1, 2, 4, 8, 16}
    assert all(mesh.context == 1 for mesh in long if mesh.stage > 1)


def test_the_command_plans_it(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["plan", "--target", "h800:2048", "--sequence-length", str(LENGTH), "--precision", "fp8", "--json"]
    assert main([*line, "--average", "none", "--micro-batch-size", "1", "--mesh", MESHES[16]]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["fits"]
    assert values["mesh"]["context"] == 16
    assert main([*line, "--mesh", "context=3,fsdp=-1"]) == 2
    assert "context" in capsys.readouterr().err


@pytest.mark.slow
def test_the_compiled_step_exchanges_what_is_planned() -> None:
    """Outputs and embeddings are sent forward and their gradients back; nothing larger than latents is gathered."""
    found = run_simulated(Path(__file__).with_name("simulated_context.py"))
    assert found["exchanged"] == pytest.approx(found["outputs and embeddings"], rel=0.02)  # and a few numbers more
    assert found["largest"] < found["latents"] < found["hidden states"] / 2
