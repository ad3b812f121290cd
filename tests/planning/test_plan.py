"""The plan on paper: against published figures, against the model itself, and its own consistency."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest

from dsv3_jax.config import ModelConfig
from dsv3_jax.counts import count_parameters
from dsv3_jax.errors import ConfigError
from dsv3_jax.planning.activations import activation_memory, kept_of_layer
from dsv3_jax.planning.advice import advise
from dsv3_jax.planning.config import PlanConfig
from dsv3_jax.planning.hardware import Target
from dsv3_jax.planning.layers import LayerKind, parameter_groups, rank_layers, stage_layers
from dsv3_jax.planning.plan import make_plan
from dsv3_jax.planning.published import GPU_HOURS, like_the_report, published_step_seconds, report_run
from dsv3_jax.planning.state_memory import state_memory
from dsv3_jax.planning.step_time import bubble_fraction
from dsv3_jax.sharding.mesh import MeshConfig

GIB = 2**30
V3 = ModelConfig.preset("v3-671b")


def plan_config(**changes: Any) -> PlanConfig:
    values: dict[str, Any] = {"model": V3, "target": Target.parse("h200:2048"), "mesh": MeshConfig(fsdp=32, expert=64)}
    return PlanConfig(**values | changes)


# arXiv 2502.07846: DP 32, TP 2, PP 16, EP 8 without expert tensor parallelism; bfloat16 weights, float32 gradients,
# a float32 copy and two bfloat16 moments. Its data parallelism of 32 is 4 x the expert axis's 8 here.
PAPER = {
    "target": Target.parse("h800:1024"),
    "mesh": MeshConfig(stage=16, data=4, expert=8, tensor=2),
    "batch_size": 32 * 32,
    "schedule": "1f1b",
    "moment_dtype": "bfloat16",
    "average": "none",
    "layout": "report",
}
PAPER_STAGE: Counter[LayerKind] = Counter({"moe": 4})


def experts_whole(elements: dict[str, float]) -> dict[str, float]:
    """The paper does not split experts, the shared one and the rotary query map over the tensor axis; we do."""
    rotary = 4 * V3.num_attention_heads * V3.qk_rope_head_dim * (V3.q_lora_rank or 0)
    return elements | {
        "routed_experts": 2 * elements["routed_experts"],
        "shared_experts": 2 * elements["shared_experts"],
        "attention_heads": elements["attention_heads"] + rotary / 2,
    }


def test_layers_are_the_published_sizes() -> None:
    """Bytes a layer in bfloat16 and parameters a stage, as the memory analysis prints them."""
    sizes = {kind: sum(group.elements for group in parameter_groups(V3, kind)) for kind in ("dense", "moe")}
    bias = V3.n_routed_experts
    assert sizes["dense"] == 583_483_392 - 2048 + 2048
    assert sizes["moe"] == 11_507_286_016 + bias
    stages = stage_layers(V3, 16)
    assert stages[0] == Counter(embedding=1, dense=3, moe=1)
    assert stages[15] == Counter(moe=1, mtp=1, head=1)
    assert all(stage == PAPER_STAGE for stage in stages[1:15])
    assert 4 * (sizes["moe"] - bias) == pytest.approx(46.03e9, rel=1e-4)


def test_parts_of_a_device_are_the_memory_analysis() -> None:
    """One middle stage under TP 2 and EP 8: norms 65,536, MLA 429,654,016, experts and router 5,820,645,376."""
    config = plan_config(**PAPER)
    held = {group.name: 4 * group.on_a_device(config.mesh) for group in parameter_groups(V3, "moe")}
    held = experts_whole(held)
    held["router"] -= 4 * V3.n_routed_experts  # the paper leaves the biases out
    assert held["norms"] == 65_536
    assert held["attention_latents"] + held["attention_heads"] == 429_654_016
    assert held["routed_experts"] + held["shared_experts"] + held["router"] == 5_820_645_376
    assert sum(held.values()) == 6_250_364_928


def test_zero_reproduces_the_memory_analysis() -> None:
    """Its rows "none" (81.50 GiB) and "os" (40.45 GiB), up to who divides the little that is not experts."""
    without_tensor = PAPER | {"mesh": MeshConfig(stage=16, data=8, expert=8)}
    for zero, optimizer in ((False, 46.57), (True, 5.52)):
        config = plan_config(**without_tensor, zero=zero)
        state = state_memory(config, PAPER_STAGE)
        attention = sum(4 * group.elements for group in parameter_groups(V3, "moe") if "attention" in group.name)
        excess = attention + sum(4 * group.elements for group in parameter_groups(V3, "moe") if group.name == "norms")
        excess -= 429_654_016 + 65_536  # theirs splits heads over two devices, which changes nothing for experts
        assert state.gradients / GIB == pytest.approx(23.28 + 4 * excess / GIB, abs=0.01)
        moved = (state.masters + state.moments) / GIB
        assert moved == pytest.approx(optimizer + (0 if zero else 8 * excess / GIB), rel=0.035 if zero else 1e-3)
        if zero:
            assert state.working_weights / GIB == pytest.approx(11.64 + 2 * excess / GIB, abs=0.01)


def test_full_recomputation_is_the_memory_analysis() -> None:
    """0.219 GiB a micro-batch: two inputs a layer over two devices there, one input a layer whole here."""
    config = plan_config(**PAPER, rematerialisation="full")
    activations = activation_memory(config, PAPER_STAGE)
    a_micro_batch = sum(activations.kept.values()) / activations.micro_batches
    expert_index = 4 * 8 * 4096 * V3.num_experts_per_tok // 4  # which it keeps, and we choose anew
    assert a_micro_batch + expert_index == 235_143_168


def test_a_dualpipe_rank_holds_what_the_report_says() -> None:
    """Two stages of four MoE layers, four routed experts and the shared one of each: 3.27B parameters."""
    plan = make_plan(report_run())
    assert plan.layers == Counter(moe=8)
    assert plan.state.parameters == pytest.approx(3.27e9, rel=2e-3)
    ends = rank_layers(V3, 16, dualpipe=True)
    assert ends[0] == ends[15] == Counter(embedding=1, dense=3, moe=2, mtp=1, head=1)


def test_the_reports_run_fits_and_took_longer_than_it_could() -> None:
    plan = make_plan(report_run())
    assert plan.fits
    published = published_step_seconds(plan.config)
    assert published == pytest.approx(19.9, abs=0.05)
    assert plan.mfu(published) == pytest.approx(0.39, abs=0.002)  # as published: 38.94%
    assert plan.bound.total < plan.expected.total < published
    assert plan.device_hours(published) == pytest.approx(GPU_HOURS)
    assert like_the_report(plan) == pytest.approx(published)


def test_bubbles_are_those_of_table_2() -> None:
    """(PP-1)(F+B), (PP-1)(F+B-2W), (PP/2-1)(F&B+B-3W) in units of a chunk with F = W = 1, B = 2, F&B = 3."""
    for schedule, idle in (("1f1b", 7 * 3), ("zb1p", 7 * 1), ("dualpipe", 3 * 2)):
        mesh = MeshConfig(stage=8, fsdp=4, expert=64)
        config = plan_config(mesh=mesh, schedule=schedule, batch_size=256 * 32, layout="report")
        assert bubble_fraction(config) * 3 * config.passes == pytest.approx(idle)


@pytest.mark.parametrize("preset", ["v3-671b", "kimi-k2-1t", "ablation-16b", "tiny"])
def test_every_parameter_is_on_some_device(preset: str) -> None:
    """What all stages hold is the model, MTP included, whatever the stages."""
    model = ModelConfig.preset(preset)
    counts = count_parameters(model)
    for stages in (1, 2, 3):
        held = sum(stage_layers(model, stages), Counter())
        total = sum(count * sum(g.elements for g in parameter_groups(model, kind)) for kind, count in held.items())
        assert total == counts.total + counts.mtp_total


def test_meshes_only_move_what_a_device_holds() -> None:
    """Parameters of all devices together are the replicas' number times the model, on any mesh."""
    target = Target.parse("h200:64")
    for mesh in (MeshConfig(fsdp=64), MeshConfig(expert=8, fsdp=8), MeshConfig(expert=4, tensor=4, fsdp=4)):
        state = state_memory(plan_config(target=target, mesh=mesh, moment_dtype="bfloat16"), Counter({"moe": 1}))
        plain = sum(group.elements for group in parameter_groups(V3, "moe"))
        assert state.moments == pytest.approx(4 * plain / 64, rel=2e-4)  # ZeRO divides replicas too
        assert state.masters == pytest.approx(4 * state.parameters)


def test_policies_keep_less_and_less() -> None:
    for precision in ("bfloat16", "fp8"):
        config = plan_config(precision=precision)
        sizes = [sum(kept_of_layer(config, "moe", policy).values()) for policy in ("none", "report", "full")]
        assert sizes[0] > sizes[1] > sizes[2]
    fp8 = sum(kept_of_layer(plan_config(precision="fp8"), "moe", "report").values())
    assert fp8 < sum(kept_of_layer(plan_config(), "moe", "report").values())


def test_a_plan_that_does_not_fit_names_knobs_that_help() -> None:
    config = plan_config(target=Target.parse("h800:256"), mesh=MeshConfig(fsdp=4, expert=64))
    plan = make_plan(config)
    assert plan.spare < 0
    advice = advise(plan)
    full = next(item for item in advice if "full" in item.change)
    turned = make_plan(dataclasses.replace(config, rematerialisation="full"))
    assert full.saved == pytest.approx(plan.memory - turned.memory)
    assert full.fits is turned.fits


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": MeshConfig(fsdp=3)}, "2048"),
        ({"target": Target.parse("h200:896"), "mesh": MeshConfig(fsdp=128, expert=7)}, "mesh.expert"),
        ({"batch_size": 2049}, "2048"),
        ({"mesh": MeshConfig(stage=16, fsdp=2, expert=64), "batch_size": 128 * 31}, "dualpipe"),
        ({"precision": "int4"}, "precision"),
        ({"rematerialisation": "some"}, "rematerialisation"),
        ({"layout": "paper"}, "layout must be one of step, report"),
        ({"layout": "report"}, "stage=16"),
        (
            {"mesh": MeshConfig(stage=16, fsdp=2, expert=64), "batch_size": 128 * 15, "schedule": "zb1p"},
            "batch_size 2048",
        ),
        ({"sequence_length": 10**6}, "max_position_embeddings"),
    ],
)
def test_what_does_not_divide_is_said(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_config(**changes)


@pytest.mark.parametrize(
    ("text", "devices", "topology"),
    [
        ("h200:2048", 2048, ()),
        ("v5p:16x16x8", 2048, (16, 16, 8)),
        ("v5p:64", 64, (4, 4, 4)),
        ("v6e:256", 256, (16, 16)),
    ],
)
def test_targets(text: str, devices: int, topology: tuple[int, ...]) -> None:
    target = Target.parse(text)
    assert (target.devices, target.topology) == (devices, topology)


@pytest.mark.parametrize("text", ["h20:8", "h200", "h200:0", "h200:2x2", "v6e:999", "v5p:7", "local:2", ""])
def test_targets_that_do_not_exist(text: str) -> None:
    with pytest.raises(ConfigError, match="target"):
        Target.parse(text)


@pytest.mark.parametrize(("precision", "there"), [("bfloat16", 2), ("fp8", 1 + 4 / 128)])
def test_a_token_crosses_once_to_each_of_its_groups(precision: str, there: float) -> None:
    """64 ranks, eight in each of eight groups and nodes: four rows between nodes, one an expert within."""
    config = plan_config(precision=precision)
    flow = next(flow for flow in make_plan(config).flows if "experts" in flow.what)
    row = 7168 * (3 * there + 2 * 2) + 8 * 5 * 4  # five numbers beside it for each of its experts
    tokens = 4096 * (58 + 1)
    between, within = (tokens * copies * 7 / 8 * row for copies in (4, 8))
    assert flow.seconds * config.target.accelerator.outer_link == pytest.approx(between)
    assert flow.sent == pytest.approx(between + within)
