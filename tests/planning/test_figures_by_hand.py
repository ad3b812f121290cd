"""Figures of plans that a reader takes for granted, each calculated again by hand: times, links, advice, peaks."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from dsv3_jax.config import ModelConfig
from dsv3_jax.counts import count_flops, count_parameters
from dsv3_jax.planning.activations import working_bytes
from dsv3_jax.planning.advice import advise
from dsv3_jax.planning.config import PlanConfig
from dsv3_jax.planning.hardware import ACCELERATORS, Target
from dsv3_jax.planning.operations import expert_operations, operations, operations_without_recomputation
from dsv3_jax.planning.plan import make_plan
from dsv3_jax.planning.stage_parts import bubble, waiting
from dsv3_jax.planning.step_time import exposed_communication
from dsv3_jax.planning.traffic import (
    GRADIENTS_SUMMED,
    REPLICAS,
    TENSOR_SUMS,
    TOKENS,
    WEIGHTS_GATHERED,
    Traffic,
    flow_over,
    leaves_node,
)
from dsv3_jax.sharding.mesh import MeshConfig

V3 = ModelConfig.preset("v3-671b")
SMALL = ModelConfig.preset("tiny", num_hidden_layers=4, first_k_dense_replace=1, num_nextn_predict_layers=0)


def config_of(**changes: Any) -> PlanConfig:
    values: dict[str, Any] = {
        "model": SMALL,
        "target": Target.parse("h100:1"),
        "mesh": MeshConfig(),
        "sequence_length": 64,
        "batch_size": 6,
        "micro_batch_size": 2,
        "rematerialisation": "none",
        "average": "none",
    }
    return PlanConfig(**values | changes)


@pytest.mark.parametrize(
    ("name", "bf16", "fp8", "memory", "bandwidth", "inner", "outer"),
    [  # data sheets, in TFLOP/s, TFLOP/s, GB, TB/s, GB/s and GB/s in one direction
        ("h100", 989, 1979, 80, 3.35, 900 / 2, 400 / 8),
        ("h200", 989, 1979, 141, 4.8, 900 / 2, 400 / 8),
        ("h800", 989, 1979, 80, 3.35, 160, 50),  # the links as section 3.2.2 measured them
        ("v5p", 459, 459, 95, 2.765, None, 6),
        ("v6e", 918, 918, 32, 1.64, None, 6),
    ],
)
def test_accelerators_are_their_data_sheets(
    name: str, bf16: float, fp8: float, memory: float, bandwidth: float, inner: float | None, outer: float
) -> None:
    accelerator = ACCELERATORS[name]
    assert accelerator.flops == pytest.approx(bf16 * 1e12, rel=1e-3)
    assert accelerator.fp8_flops == pytest.approx(fp8 * 1e12, rel=1e-3)
    assert accelerator.bandwidth == pytest.approx(bandwidth * 1e12, rel=1e-3)
    assert accelerator.memory in (memory * 1e9, memory * 2**30)
    assert accelerator.outer_link == outer * 1e9
    if inner is not None:
        assert accelerator.inner_link == pytest.approx(inner * 1e9)


def test_time_of_a_step_on_one_device() -> None:
    """Products at their peaks; activations moved six times; masters and moments read and written, gradients read."""
    config = config_of()
    plan = make_plan(config)
    terms, tokens = count_flops(SMALL, 64).terms, 6 * 64
    core = terms["attention_core"]
    time = plan.bound
    assert time.fp8_products == time.exposed == time.bubble == 0
    assert time.products == pytest.approx(3 * (sum(terms.values()) - core) * tokens / 989e12)
    assert time.attention == pytest.approx(1.5 * 3 * core * tokens / 989e12)  # two chunks: three quarters of the square
    moved = 3 * (working_bytes(config, "dense") + 3 * working_bytes(config, "moe"))  # of three micro-batches
    assert time.memory == pytest.approx(6 * moved / 3.35e12)
    parameters = count_parameters(SMALL).total - 3 * SMALL.n_routed_experts * SMALL.has_router_bias
    assert time.optimizer == pytest.approx((2 * (4 + 2 * 4) + 4) * parameters / 3.35e12)
    assert time.total == pytest.approx(time.products + time.attention + time.memory + time.optimizer)
    best = plan.expected
    assert best.products / time.products == pytest.approx(1 / 0.78)
    assert best.attention / time.attention == pytest.approx(1 / (0.78 * 0.65))
    assert best.memory / time.memory == best.optimizer / time.optimizer == pytest.approx(1 / 0.9)


def test_stages_move_activations_as_often_as_they_compute() -> None:
    """A stage reads and writes twice forward, and four times in its one backward pass, its share of the layers."""
    config = config_of(
        target=Target.parse("h100:2"), mesh=MeshConfig(stage=2), batch_size=8, micro_batch_size=1, schedule="1f1b"
    )
    moved = 8 * (working_bytes(config, "dense") + 3 * working_bytes(config, "moe")) / 2
    assert make_plan(config).bound.memory == pytest.approx((2 + 4) * moved / 3.35e12)


def test_only_what_fits_beside_computation_is_hidden() -> None:
    """FSDP's gathers and sums run beside it; tensor sums, replicas and tokens never do."""
    config = config_of(target=Target.parse("h100:2"), mesh=MeshConfig(fsdp=2), batch_size=0)

    def flow(what: str, seconds: float) -> Traffic:
        return Traffic("fsdp", what, 1.0, seconds, False)

    hidden = [flow(WEIGHTS_GATHERED, 3.0), flow(GRADIENTS_SUMMED, 2.0)]
    assert exposed_communication(config, hidden, computing=10.0, experts=0.0) == 0
    assert exposed_communication(config, hidden, computing=4.0, experts=0.0) == pytest.approx(1.0)
    exposed = [flow(TENSOR_SUMS, 0.1), flow(REPLICAS, 0.2), flow(TOKENS, 0.4)]
    assert exposed_communication(config, hidden + exposed, computing=10.0, experts=0.0) == pytest.approx(0.7)
    assert exposed_communication(config, hidden + exposed, computing=4.0, experts=0.0) == pytest.approx(1.7)


def test_products_of_experts_hide_the_exchange_of_tokens() -> None:
    """They hide as much as they take, of 14 of 16 pieces (there are two hops); a TPU's exchange is not hidden."""
    gpu, tpu = (
        PlanConfig(model=V3, target=Target.parse(target), mesh=MeshConfig(expert=64))
        for target in ("h800:64", "v5p:64")
    )
    tokens = [Traffic("expert", TOKENS, 1.0, 1.0, True)]
    assert exposed_communication(gpu, tokens, computing=9.0, experts=0.3) == pytest.approx(0.7)
    assert exposed_communication(gpu, tokens, computing=9.0, experts=3.0) == pytest.approx(2 / 16)
    assert exposed_communication(tpu, tokens, computing=9.0, experts=3.0) == 1
    # 8 experts in 58 layers and the MTP module: forward, two of three maps again in the backward pass, one gradient.
    one = 2 * 3 * 7168 * 2048 * 8 * 59
    assert expert_operations(gpu, 0) == pytest.approx((1 + 2 / 3 + 1) * one * 4096)


@pytest.mark.parametrize(("stages", "policy", "runs"), [(1, "report", 2 + 2), (2, "report", 2 + 2), (2, "full", 2 + 4)])
def test_sums_of_partial_results(stages: int, policy: Any, runs: int) -> None:
    """Two all-reduces per layer forward, two for its gradients, and two more where it is computed again."""
    config = config_of(
        target=Target.parse(f"h100:{2 * stages}"),
        mesh=MeshConfig(stage=stages, tensor=2),
        batch_size=8,
        micro_batch_size=1,
        schedule="1f1b",
        rematerialisation=policy,
    )
    (flow,) = (flow for flow in make_plan(config).flows if flow.what == TENSOR_SUMS)
    layers = 4 / stages
    hidden = 64 * SMALL.hidden_size * 2
    assert flow.sent == pytest.approx(8 * layers * runs * 2 * (1 / 2) * hidden)
    assert flow.seconds == pytest.approx(flow.sent / 450e9)


@pytest.mark.parametrize(
    ("mesh", "outside"),
    [
        (MeshConfig(data=2, fsdp=8), {"data"}),
        (MeshConfig(expert=8, tensor=2), {"stage", "data", "fsdp", "expert"}),
        (MeshConfig(data=16), {"stage", "data"}),
        (MeshConfig(stage=2, expert=8), {"stage"}),
    ],
)
def test_links_between_nodes_of_eight(mesh: MeshConfig, outside: set[str]) -> None:
    """An axis stays inside while it and the axes after it fill at most one node."""
    config = config_of(target=Target.parse("h100:16"), mesh=mesh, batch_size=0, schedule="1f1b")
    left = {axis for axis in ("stage", "data", "fsdp", "expert", "tensor") if leaves_node(config, axis)}
    assert outside - {"stage"} <= left
    assert {axis for axis in left if mesh.sizes[axis] > 1} == {axis for axis in outside if mesh.sizes[axis] > 1}


def test_the_slower_of_two_kinds_of_links_decides() -> None:
    config = config_of(model=V3, target=Target.parse("h100:16"), mesh=MeshConfig(expert=16), batch_size=0)
    outer = flow_over(config, "expert", TOKENS, 50e9, in_node=450e9 / 2)
    assert (outer.seconds, outer.sent, outer.between_nodes) == (1.0, 50e9 + 225e9, True)
    assert flow_over(config, "expert", TOKENS, 50e9, in_node=3 * 450e9).seconds == pytest.approx(3.0)
    assert flow_over(config, "tensor", TENSOR_SUMS, 450e9).seconds == 1.0


def test_advice_costs_time_where_more_is_computed() -> None:
    """Full recomputation is slower by the quotient of the two times per token, where links do not take longer."""
    config = PlanConfig(
        model=V3, target=Target.parse("h800:256"), mesh=MeshConfig(fsdp=4, expert=64), zero=False, micro_batch_size=8
    )
    plan = make_plan(config)
    advice = {item.change: item for item in advise(plan)}
    full = make_plan(dataclasses.replace(config, rematerialisation="full"))
    assert full.expected.total > plan.expected.total
    found = advice["--training.rematerialisation full"]
    assert found.slower == pytest.approx(full.expected.total / plan.expected.total - 1)
    assert found.saved == pytest.approx(plan.memory - full.memory)
    cut = advice["--training.micro-batch-size 1024"]
    assert cut.slower == pytest.approx(
        make_plan(dataclasses.replace(config, micro_batch_size=4)).expected.total / plan.expected.total - 1
    )


def test_advice_that_is_enough_comes_first_and_the_cheapest_of_it() -> None:
    config = PlanConfig(
        model=V3, target=Target.parse("h800:256"), mesh=MeshConfig(fsdp=4, expert=64), zero=False, micro_batch_size=2
    )
    advice = advise(make_plan(config))
    fitting = [item for item in advice if item.fits]
    others = [item for item in advice if not item.fits]
    assert advice == fitting + others
    assert [item.slower for item in fitting] == sorted(item.slower for item in fitting)
    assert [item.saved for item in others] == sorted((item.saved for item in others), reverse=True)
    assert len(others) > 2


def test_memory_of_the_loss() -> None:
    """Logits, their exponentials and gradients in float32, of the tokens that are held at a time."""
    config = config_of()
    chunk = config.run.training.loss_chunk
    pieces = min(-(-2 * 64 // chunk), 64)
    assert make_plan(config).activations.loss == 3 * (2 * -(-64 // pieces)) * SMALL.vocab_size * 4


def test_recomputed_share_of_the_reports_policy() -> None:
    """Queries, keys, values of 62 layers from their latents; routed experts of 59 but their down maps; the core."""
    config = PlanConfig(model=V3, target=Target.parse("h200:2048"), mesh=MeshConfig(fsdp=32, expert=64))
    tokens = config.tokens_per_step / 2048
    up = 2 * (128 * 192 * 1536 + 128 * 256 * 512) * 62
    experts = 2 * 8 * 2 * 7168 * 2048
    once, made = operations_without_recomputation(config), operations(config)
    assert made.products - once.products == pytest.approx(tokens * (up + 59 * experts))
    plan = make_plan(config)
    assert plan.recomputed == pytest.approx(made.total / once.total - 1)


def test_idle_time_is_that_of_the_average_rank() -> None:
    """The last stage, with the head, is the busiest: the others wait for it, which `waiting` does not count."""
    config = config_of(
        target=Target.parse("h100:3"), mesh=MeshConfig(stage=3), batch_size=12, micro_batch_size=1, schedule="1f1b"
    )
    assert bubble(config) > waiting(config) - 1 + 0.05
    even = config_of(
        model=V3.replace(num_hidden_layers=4, first_k_dense_replace=0, num_nextn_predict_layers=0, vocab_size=1),
        target=Target.parse("h100:4"),
        mesh=MeshConfig(stage=4),
        batch_size=8,
        micro_batch_size=1,
        schedule="1f1b",
    )
    # A tick takes as long as the slowest rank: of the 8 + 3 forward and 8 + 3 backward ticks 8 of each are computed.
    assert bubble(even) == pytest.approx(waiting(even) - 1, rel=1e-3)
    assert bubble(even) >= 3 / 8


def test_gathered_layers_of_the_671b_model() -> None:
    """Two layers' weights and one's gradients; the head is larger than a MoE layer on 64 expert ranks."""
    config = PlanConfig(
        model=V3, target=Target.parse("h200:2048"), mesh=MeshConfig(fsdp=32, expert=64), precision="bfloat16"
    )
    linear = 187_105_280 + 5 * 3 * 7168 * 2048
    of_layer = 256 * 7168 * (2 * 4 + 4) + linear * (2 * 2 + 4)
    of_head = 129280 * 7168 * (2 * 2 + 4)
    assert make_plan(config).state.gathered_weights == max(of_layer, of_head) == of_head
    small = dataclasses.replace(config, model=V3.replace(vocab_size=1024, first_k_dense_replace=0))
    projection = 2 * 7168**2 * (2 * 2 + 4)  # of the MTP module, beside its layer
    assert make_plan(small).state.gathered_weights == of_layer + projection


def test_a_tpu_sends_whole_rows_of_128_numbers() -> None:
    """Beside a row, 16 numbers of 8 experts take 128; in FP8 together with the 56 scales: one row of lanes as well."""
    for precision, there in (("bfloat16", 2 * 7168 + 128 * 4), ("fp8", 7168 + 128 * 4)):
        config = PlanConfig(
            model=V3, target=Target.parse("v5p:64"), mesh=MeshConfig(expert=64), precision=precision, average="none"
        )
        (flow,) = (flow for flow in make_plan(config).flows if flow.what == TOKENS)
        gradients = 2 * 7168 if precision == "bfloat16" else 7168 + 128 * 4
        row = 2 * there + 2 * 2 * 7168 + gradients + 128 * 4
        # Four of eight groups and then eight experts; all ranks are in one node, whose links both hops use.
        assert flow.sent == pytest.approx(4096 * 59 * row * (4 + 8) * 7 / 8)
