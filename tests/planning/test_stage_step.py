"""Plans of pipelined steps: against the step's own rules and exchanges, by hand, and by the compiler."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from dsv3_jax.config import ModelConfig
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.pipeline.passes import split_parts, weights_of_rank
from dsv3_jax.pipeline.slots import moe_layers_of_stages
from dsv3_jax.pipeline.weights import manual_axes, specs_of, weight_layouts
from dsv3_jax.planning.collectives import read_collectives
from dsv3_jax.planning.config import PlanConfig
from dsv3_jax.planning.hardware import Target
from dsv3_jax.planning.operations import operations, operations_without_recomputation
from dsv3_jax.planning.plan import RESERVED, make_plan
from dsv3_jax.planning.step_time import Reached, expert_seconds
from dsv3_jax.planning.traffic import TOKENS
from dsv3_jax.planning.weights import weights_of
from dsv3_jax.sharding.mesh import MeshConfig
from dsv3_jax.sharding.rules import rules_over_stages, shardings

GIB = 2**30
V3 = ModelConfig.preset("v3-671b")
STEP = PlanConfig(
    model=V3,
    target=Target.parse("h800:2048"),
    mesh=MeshConfig(stage=16, data=2, expert=64),
    batch_size=15360,
    precision="fp8",
    average="none",
)
"""The report's mesh and batch."""

HIDDEN = 4096 * 7168 * 2  # bytes of a micro-batch's hidden states in bfloat16: 56 MiB
SMALL = ModelConfig.preset("tiny", num_hidden_layers=5, first_k_dense_replace=1, num_nextn_predict_layers=1)


def staged(**changes: Any) -> PlanConfig:
    values: dict[str, Any] = {
        "model": SMALL,
        "target": Target.parse("h100:64"),
        "mesh": MeshConfig(stage=4, data=2, fsdp=2, expert=2, tensor=2),
        "sequence_length": 64,
        "average": "none",
    }
    return PlanConfig(**values | changes)


def real_parameters(model: ModelConfig) -> nnx.State:
    return nnx.state(nnx.eval_shape(lambda: DeepSeekV3(model, rngs=nnx.Rngs(0))), nnx.Param)


def counted_from_the_step(config: PlanConfig) -> dict[str, float]:
    """Elements a device, from the real tree, its shardings, and the shapes that the step's own exchange arrives at."""
    sizes = config.mesh.sizes
    mesh: Any = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    layers, params = moe_layers_of_stages(config.model, config.mesh.stage), real_parameters(config.model)
    directions = 2 if config.schedule == "dualpipe" else 1

    def elements(rules: Any) -> float:
        placed = jax.tree.leaves(shardings(params, mesh, rules))
        shapes = [leaf.shape for leaf in jax.tree.leaves(params)]
        return sum(math.prod(one.shard_shape(shape)) for one, shape in zip(placed, shapes, strict=True))

    layouts = split_parts(weight_layouts(params, mesh, layers))

    def on_a_rank(parts: Any) -> Any:
        weights, _ = weights_of_rank(parts, layouts, layers, directions)
        return jax.tree.map(lambda leaf: leaf.reshape(1, -1), jax.tree.leaves(weights))

    # The ranks' parts of the result are stacked along a first dimension that all axes cut.
    axes = manual_axes(mesh)
    every = PartitionSpec(tuple(axis for axis in mesh.axis_names if axis in axes))
    run = jax.shard_map(
        on_a_rank, mesh=mesh, in_specs=(specs_of(layouts),), out_specs=every, axis_names=axes, check_vma=False
    )
    return {
        "masters": elements(rules_over_stages(layers)),
        "moments": elements(rules_over_stages(layers, config.zero)),
        "working": sum(leaf.shape[1] for leaf in jax.eval_shape(jax.jit(run), split_parts(params))),
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"mesh": MeshConfig(stage=4, data=2, fsdp=2, expert=4)},  # by layers: one MoE layer a stage
        {"mesh": MeshConfig(stage=2, data=4, fsdp=2, expert=4), "schedule": "1f1b"},  # four layers are not halves
        {"mesh": MeshConfig(stage=4, data=4, fsdp=2, expert=2), "zero": False},
        # Its own layers fill the slots of the last stage, so that two blocks of MTP modules need two more.
        {"model": SMALL.replace(num_nextn_predict_layers=2), "mesh": MeshConfig(stage=2, data=4, fsdp=2, expert=4)},
        {  # one and three of four layers
            "model": SMALL.replace(num_hidden_layers=6, first_k_dense_replace=2),
            "mesh": MeshConfig(stage=2, data=4, fsdp=2, expert=4),
        },
        {
            "model": V3,
            "target": Target.parse("h800:2048"),
            "mesh": MeshConfig(stage=16, data=2, expert=64),
            "sequence_length": 4096,
        },
        {
            "model": V3,
            "target": Target.parse("h800:2048"),
            "mesh": MeshConfig(stage=8, fsdp=4, expert=64),
            "schedule": "zb1p",
            "sequence_length": 4096,
        },
    ],
)
def test_weights_lie_as_the_step_lays_them(changes: dict[str, Any]) -> None:
    config = staged(**changes)
    weights = weights_of(config)
    found = {
        "masters": sum(weight.in_state for weight in weights),
        "moments": sum(weight.moments for weight in weights) / 2,
        "working": sum(weight.in_step for weight in weights),
    }
    assert found == pytest.approx(counted_from_the_step(config), rel=1e-9)


def test_memory_of_the_671b_step_by_hand() -> None:
    """Four slots a stage, both ways, MTP in one; dense layers on every rank; a sixteenth of embedding and head."""
    plan = make_plan(STEP)
    attention, expert = 187_105_280, 3 * 7168 * 2048  # linear maps
    norms, router = 1536 + 512 + 2 * 7168, 256 * 7168
    moe_maps, dense_maps = attention + 5 * expert, attention + 3 * 7168 * 18432
    in_fp8 = 8 * moe_maps + 3 * dense_maps
    in_bfloat16 = 2 * 129280 * 7168 / 16 + 2 * 7168**2
    in_float32 = 8 * (norms + router) + 3 * norms + 4 * 7168
    assert plan.state.working_weights == (1 + 4 / 128**2) * in_fp8 + 2 * in_bfloat16 + 4 * in_float32
    assert plan.state.gradients == 4 * (in_fp8 + in_bfloat16 + in_float32)
    # 17 slots, each for four layers, of which three may be dense. Of each: two hidden states, the latents, attention's
    # output and the logarithms of its sums; of four MoE layers the inputs of SwiGLU and the router's logits, of three
    # dense layers the former.
    common = 2 * (2 * 7168 + 1536 + 576) + 128 * (128 * (1.5 + 4 / 128) + 4)
    slot = 4 * (common + 2 * 2048 * (1 + 4 / 128) + 256 * 4) + 3 * 2 * 18432 * (1 + 4 / 128)
    kept = plan.activations.kept
    assert kept.pop("received from other stages") == (2 + 2) * HIDDEN
    assert sum(kept.values()) == 17 * 4096 * slot
    # One MoE layer's gradients beside its weights, what its backward pass reads, and the buffers of the exchange; the
    # gradients of attention. A dense layer's are less.
    tiles = 4096 * (128 * ((192 + 128 + 128) * 2 + 4) + 64 * 4)
    # 16 pieces of 256 tokens: 2,048 rows behind the first hop and 3,072 behind the second, four arrays of two pieces;
    # what experts compute of their rows; the operands of weights' gradients, of all pieces in FP8; gradients of
    # weights, of a block and of what is added up; and the weights in FP8 in two orders.
    computed = (8 * 256 * 1.25 + 4 * 128 + 128) * (2 * 7168 + 3 * 2048)
    rows = 4 * (8 * 256 + 8 * 384) * 7168 + computed
    buffers = 2 * rows * 2 + 16 * computed + (4 * 4 + 2) * 4 * expert
    layer = (5 + 4 / 128**2) * moe_maps + 8 * (norms + router)
    read = plan.activations.recomputed - (layer + tiles + buffers)
    # Queries, keys and values; the core's output as it is, and in 12 bits; the latents; four hidden states in FP8 and
    # five in bfloat16, the layer's input among them, within a tenth.
    queries = 128 * ((192 + 128 + 128) * 2 + 4)
    output = 128 * 128 * (2 + 1.5)
    by_hand = 4096 * (queries + output + 2 * (1536 + 576) + 7168 * (4 * 1 + 5 * 2))
    assert read == pytest.approx(by_hand, rel=0.1)
    # Two directions' micro-batches, each with the hidden states of two depths and their gradients.
    logits, head = 2 * 2 * 4096 * 129280 / 16 * 4, 129280 * 7168 / 16 * 2
    hidden = 2 * 2 * 2 * HIDDEN
    kept = 2 * (4 * 7168 + 1536 + 576) + 128 * (128 * (1.5 + 4 / 128) + 4) + 2 * 2048 * (1 + 4 / 128) + 256 * 4
    assert plan.activations.loss == logits + head + hidden + 4096 * kept + layer


def test_the_compiler_said_so() -> None:
    """Bytes that `--compile` found for the report's mesh with jax 0.11.2, of the arguments and at the peak."""
    plan = make_plan(dataclasses.replace(STEP, attention="scan"))
    assert plan.state.masters + plan.state.moments == pytest.approx(8_307_085_028, rel=0.02)
    assert plan.memory - RESERVED == pytest.approx(72_919_599_009, rel=0.05)


def test_traffic_between_stages_by_hand() -> None:
    """120 micro-batches, two arrays sent for each, and more at both ends; four layers out and back, for either way."""
    plan = make_plan(STEP)
    flows = {flow.what: flow.sent for flow in plan.flows}
    assert flows["hidden states and gradients"] == (2 * 120 + 54) * HIDDEN
    maps, others = 187_105_280 + 5 * 3 * 7168 * 2048, 1536 + 512 + 2 * 7168 + 256 * 7168
    layers = 4 * ((5 + 4 / 128**2) * maps + 8 * others)  # weights, and gradients in float32
    assert flows["opposite stages' weights, gradients"] == layers
    table = 129280 * 7168 / 16 * (2 + 4)  # every stage has its columns of the embedding already
    block = layers / 4  # of the MTP module: all ranks get it, though only the last stage keeps it
    both = plan.state.working_weights + plan.state.gradients - layers - table + block
    assert flows["weights to stages, gradients back"] == pytest.approx(15 / 16 * both, rel=2e-3)
    # In 60 ticks both ends begin a micro-batch, in 60 both compute losses, and in 60 both finish one: two exchanges of
    # embeddings and two of their gradients; hidden states of two depths, and their gradients, as parts of one
    # micro-batch and as two gathered or reduced ones.
    assert flows["embeddings, heads' hidden states"] == 60 * 15 / 16 * (4 + 2 * 2 * (1 + 2)) * HIDDEN


@pytest.mark.parametrize(("schedule", "backward"), [("1f1b", 1), ("zb1p", 2)])
def test_a_split_backward_pass_computes_and_sends_anew(schedule: str, backward: int) -> None:
    """Both halves compute again what is not kept, here all; the first stage's input has no gradient of its own."""
    model = SMALL.replace(num_hidden_layers=4, first_k_dense_replace=0, num_nextn_predict_layers=0)
    mesh = MeshConfig(stage=4, expert=4)
    config = staged(model=model, target=Target.parse("h100:16"), mesh=mesh, schedule=schedule, rematerialisation="full")
    tokens, (d, chosen) = config.passes * 64, (model.hidden_size, model.num_experts_per_tok)
    plan = make_plan(config)
    flow = next(flow for flow in plan.flows if "experts" in flow.what)
    beside = 2 * chosen * 4
    forward = 2 * d + beside + 2 * d
    anew = 2 * d + beside + 2 * d + 2 * d + chosen * 4
    copies = min(chosen, 4)
    assert flow.sent == pytest.approx(tokens * copies * 3 / 4 * (forward + backward * anew))

    made, once = operations(config), operations_without_recomputation(config)
    # 64 positions in two chunks: three quarters of the square. One forward unit, and in each half one again and two.
    stages = np.array([1 + 3 * (1 if stage == 0 else backward) for stage in range(4)])
    assert made.attention / once.attention == pytest.approx(1.5 * stages.mean() / 3)
    # Head once each way; other products forward, and again with one or two gradients, but for experts' down maps.
    head, router = 2 * d * model.vocab_size, 4 * 2 * d * model.n_routed_experts
    unit = (once.products / (3 * config.tokens_per_step / 16) - head - router) + router
    again = np.array([1 if stage == 0 else backward for stage in range(4)])
    down = 4 * 2 * d * model.moe_intermediate_size * chosen
    products = np.mean(2 + 2 * again) * unit - np.mean(again) * down + 3 * head
    assert made.products == pytest.approx(products * config.tokens_per_step / 16)


def test_ranks_wait_for_the_busiest_and_hide_what_they_send_to_experts() -> None:
    plan = make_plan(STEP)
    sent, tokens = sum(flow.seconds for flow in plan.flows), next(x.seconds for x in plan.flows if x.what == TOKENS)
    hidden = tokens * 14 / 16  # two hops of 16 pieces are before the first product or behind the last
    experts = expert_seconds(STEP, plan.rank, Reached.by_best_kernels(STEP.target.accelerator))
    assert 1 < experts < hidden < experts + plan.expected.exchange
    assert sent - hidden < plan.expected.exposed < 1.5 * (sent - hidden)
    assert plan.expected.bubble > 0.1 * (plan.expected.fp8_products + plan.expected.attention)


def test_collectives_in_branches_are_found() -> None:
    hlo = """HloModule step

%one (p: f32[8]) -> f32[8] {
  ROOT %summed = f32[8]{0} all-reduce(%p), replica_groups={{0,1}}, to_apply=%add
}

%other (q: f32[8]) -> f32[8] {
  ROOT %gathered = f32[16]{0} all-gather(%q), replica_groups={{0,1}}, dimensions={0}
}

ENTRY %main () -> f32[8] {
  ROOT %chosen = f32[8]{0} conditional(%is, %x, %y), true_computation=%one, false_computation=%other
}
"""
    assert {(item.kind, item.runs) for item in read_collectives(hlo)} == {("all-reduce", 1), ("all-gather", 1)}
