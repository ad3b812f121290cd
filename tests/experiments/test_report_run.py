"""Checks the calculation of the report's own run against its published figures and against arXiv 2502.07846."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dsv3_jax.config import ModelConfig
from dsv3_jax.counts import count_parameters
from dsv3_jax.planning.config import PlanConfig
from dsv3_jax.planning.hardware import Target
from dsv3_jax.planning.step_time import REPORT_FRACTION
from dsv3_jax.planning.weights import LayerKind
from dsv3_jax.sharding.mesh import MeshConfig

GIB = 2**30
V3 = ModelConfig.preset("v3-671b")

# arXiv 2502.07846: DP 32, TP 2, PP 16, EP 8 without expert tensor parallelism; bfloat16 weights, float32 gradients,
# a float32 copy and two bfloat16 moments. Its data parallelism of 32 is 4 x the expert axis's 8 here.
PAPER_STAGE: Counter[LayerKind] = Counter({"moe": 4})


def paper(run: Any, **changes: Any) -> PlanConfig:
    values: dict[str, Any] = {
        "target": Target.parse("h800:1024"),
        "mesh": MeshConfig(stage=16, data=4, expert=8, tensor=2),
        "batch_size": 32 * 32,
        "precision": "bfloat16",
        "schedule": "1f1b",
    }
    return dataclasses.replace(run.REPORT_RUN, **values | changes)


def test_the_reports_run_is_what_it_was(run: Any) -> None:
    """A device needs 77.1 GiB, and the constant of `dsv3 plan` follows from these times."""
    plan = run.report_plan(run.REPORT_RUN)
    assert plan.fits
    assert plan.memory == 82_764_972_992
    assert (plan.state.masters, plan.state.working_weights) == (1_438_410_784, 3_288_871_808)
    assert plan.bound.total == pytest.approx(7.362924, rel=1e-6)
    assert plan.expected.total == pytest.approx(9.990290, rel=1e-6)
    assert run.report_fraction() == pytest.approx(REPORT_FRACTION, rel=1e-12)


def test_published_figures(run: Any) -> None:
    plan = run.report_plan(run.REPORT_RUN)
    published = plan.at_the_reports_pace
    assert published == pytest.approx(19.9, abs=0.05)
    assert plan.mfu(published) == pytest.approx(0.39, abs=0.002)  # as published: 38.94%
    assert plan.bound.total < plan.expected.total < published
    assert plan.device_hours(published) == pytest.approx(run.GPU_HOURS)


def test_the_kept_results_reproduce(run: Any, tmp_path: Path) -> None:
    run.main(["--out", str(tmp_path)])
    for name in ("plan.json", "plan.txt"):
        assert (tmp_path / name).read_text() == (run.RESULTS / name).read_text()
    assert json.loads((tmp_path / "plan.json").read_text())["fits"]


def test_a_dualpipe_rank_holds_what_the_report_says(run: Any) -> None:
    """Two stages of four MoE layers, with four routed experts and the shared one per layer, have 3.27B parameters."""
    plan = run.report_plan(run.REPORT_RUN)
    assert plan.layers == Counter(moe=8)
    assert plan.state.parameters == pytest.approx(3.27e9, rel=2e-3)
    ends = run.rank_layers(V3, 16, dualpipe=True)
    assert ends[0] == ends[15] == Counter(embedding=1, dense=3, moe=2, mtp=1, head=1)


def test_layers_are_the_published_sizes(run: Any) -> None:
    sizes = {kind: sum(group.elements for group in run.parameter_groups(V3, kind)) for kind in ("dense", "moe")}
    bias = V3.n_routed_experts
    assert sizes["dense"] == 583_483_392
    assert sizes["moe"] == 11_507_286_016 + bias
    stages = run.stage_layers(V3, 16)
    assert stages[0] == Counter(embedding=1, dense=3, moe=1)
    assert stages[15] == Counter(moe=1, mtp=1, head=1)
    assert all(stage == PAPER_STAGE for stage in stages[1:15])


@pytest.mark.parametrize("preset", ["v3-671b", "kimi-k2-1t"])
def test_every_parameter_is_on_some_stage(run: Any, preset: str) -> None:
    model = ModelConfig.preset(preset)
    counts = count_parameters(model)
    for stages in (1, 2, 3):
        held = sum(run.stage_layers(model, stages), Counter())
        total = sum(count * sum(g.elements for g in run.parameter_groups(model, kind)) for kind, count in held.items())
        assert total == counts.total + counts.mtp_total


def test_parts_of_a_device_are_the_memory_analysis(run: Any) -> None:
    """One middle stage under TP 2 and EP 8 has norms of 65,536, MLA 429,654,016, experts and router 5,820,645,376."""
    held = {group.name: 4 * group.on_a_device(paper(run).mesh) for group in run.parameter_groups(V3, "moe")}
    # The paper does not shard experts, the shared one and the rotary query map over the tensor axis; we do.
    held["routed_experts"] *= 2
    held["shared_experts"] *= 2
    held["attention_heads"] += 4 * V3.num_attention_heads * V3.qk_rope_head_dim * (V3.q_lora_rank or 0) / 2
    held["router"] -= 4 * V3.n_routed_experts  # the paper leaves the biases out
    assert held["norms"] == 65_536
    assert held["attention_latents"] + held["attention_heads"] == 429_654_016
    assert held["routed_experts"] + held["shared_experts"] + held["router"] == 5_820_645_376
    assert sum(held.values()) == 6_250_364_928


@pytest.mark.parametrize(("zero", "optimizer"), [(False, 46.57), (True, 5.52)])
def test_zero_reproduces_the_memory_analysis(run: Any, zero: bool, optimizer: float) -> None:
    """Its rows are "none" (81.50 GiB) and "os" (40.45 GiB); only what is not experts, little, is sharded otherwise."""
    config = paper(run, mesh=MeshConfig(stage=16, data=8, expert=8), zero=zero)
    state = run.state_memory(config, PAPER_STAGE)
    excess = sum(4 * g.elements for g in run.parameter_groups(V3, "moe") if "attention" in g.name or g.name == "norms")
    excess -= 429_654_016 + 65_536  # the paper splits heads over two devices, which changes nothing for experts
    assert state.gradients / GIB == pytest.approx(23.28 + 4 * excess / GIB, abs=0.01)
    moved = (state.masters + state.moments) / GIB
    assert moved == pytest.approx(optimizer + (0 if zero else 8 * excess / GIB), rel=0.035 if zero else 1e-3)
    if zero:
        assert state.working_weights / GIB == pytest.approx(11.64 + 2 * excess / GIB, abs=0.01)


def test_full_recomputation_is_the_memory_analysis(run: Any) -> None:
    """Both keep 0.219 GiB per micro-batch: the paper two inputs per layer over two devices, we one whole input."""
    activations = run.activation_memory(paper(run, rematerialisation="full"), PAPER_STAGE)
    each = sum(activations.kept.values()) / activations.micro_batches
    expert_index = 4 * 8 * 4096 * V3.num_experts_per_tok // 4  # which the paper keeps, and we choose again
    assert each + expert_index == 235_143_168


@pytest.mark.parametrize(("schedule", "idle"), [("1f1b", 7 * 3), ("zb1p", 7 * 1), ("dualpipe", 3 * 2)])
def test_bubbles_are_those_of_table_2(run: Any, schedule: str, idle: int) -> None:
    """They are (PP-1)(F+B), (PP-1)(F+B-2W) and (PP/2-1)(F&B+B-3W), with F = W = 1, B = 2 and F&B = 3 chunks."""
    mesh = MeshConfig(stage=8, data=4, expert=64)
    config = dataclasses.replace(run.REPORT_RUN, mesh=mesh, schedule=schedule, batch_size=256 * 32)
    assert run.bubble_fraction(config) * 3 * config.passes == pytest.approx(idle)
