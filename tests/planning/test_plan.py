"""Plans: state and activations against the model itself and counts by hand, traffic by hand, and their checks."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, get_args

import jax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from dsv3_jax.cli.main import main
from dsv3_jax.config import ModelConfig
from dsv3_jax.counts import count_parameters
from dsv3_jax.errors import ConfigError
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.pipeline.slots import moe_layers_of_stages
from dsv3_jax.planning.advice import advise
from dsv3_jax.planning.attention_form import attention_form
from dsv3_jax.planning.config import PlanConfig, of_preset
from dsv3_jax.planning.hardware import Target
from dsv3_jax.planning.operations import operations, operations_without_recomputation
from dsv3_jax.planning.plan import Plan, make_plan
from dsv3_jax.planning.search import meshes, search
from dsv3_jax.planning.weights import LayerKind, weights_of
from dsv3_jax.sharding.mesh import MeshConfig
from dsv3_jax.training.defaults import default_run
from dsv3_jax.training.state import new_state
from dsv3_jax.training.state_layout import StateLayout

GIB = 2**30
V3 = ModelConfig.preset("v3-671b")
SMALL = ModelConfig.preset("tiny", num_hidden_layers=5, first_k_dense_replace=1, num_nextn_predict_layers=1)


def plan_config(**changes: Any) -> PlanConfig:
    values: dict[str, Any] = {
        "model": V3,
        "target": Target.parse("h200:2048"),
        "mesh": MeshConfig(fsdp=32, expert=64),
        "average": "none",
    }
    return PlanConfig(**values | changes)


@pytest.mark.parametrize("preset", ["v3-671b", "kimi-k2-1t", "ablation-16b", "tiny"])
def test_weights_are_all_of_the_model(preset: str) -> None:
    """On one device they are the parameters by the independent count, without the router biases."""
    model = ModelConfig.preset(preset)
    weights = weights_of(plan_config(model=model, target=Target.parse("h200:1"), mesh=MeshConfig(), sequence_length=64))
    counts = count_parameters(model)
    biases = model.has_router_bias * model.n_routed_experts * (model.num_moe_layers + model.num_nextn_predict_layers)
    assert sum(weight.in_step for weight in weights) == counts.total + counts.mtp_total - biases
    assert {weight.kind for weight in weights} <= set(get_args(LayerKind))


@pytest.mark.parametrize(
    "changes",
    [
        {"mesh": MeshConfig(data=2, fsdp=4, expert=4, tensor=2)},
        {"mesh": MeshConfig(data=4, fsdp=4, expert=4), "zero": False, "average": "device"},
        {"mesh": MeshConfig(stage=4, data=2, fsdp=2, expert=2, tensor=2), "moment_dtype": "bfloat16"},
        {"mesh": MeshConfig(data=2, fsdp=4, expert=4, tensor=2), "optimizer": "muon"},
        {"mesh": MeshConfig(fsdp=4, context=2, expert=8)},
    ],
)
def test_state_is_the_train_state_as_it_is_sharded(changes: dict[str, Any]) -> None:
    """Bytes of every array of the abstract train state under the run's own layout, but for a few numbers."""
    config = plan_config(model=SMALL, target=Target.parse("h200:64"), sequence_length=64, **changes)
    sizes = config.mesh.sizes
    mesh: Any = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    layers = moe_layers_of_stages(SMALL, config.mesh.stage) if config.has_stages else ()
    state = jax.eval_shape(lambda: new_state(DeepSeekV3(SMALL, rngs=nnx.Rngs(0)), config.run)[1])
    shardings = StateLayout(mesh, config.zero, layers=layers).of_state(state)

    def bytes_of(tree: Any, shards: Any) -> int:
        pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(shards), strict=True)
        return sum(jax.numpy.dtype(leaf.dtype).itemsize * math.prod(s.shard_shape(leaf.shape)) for leaf, s in pairs)

    planned = make_plan(config).state
    assert planned.masters == bytes_of(state.params, shardings.params)
    moments = [
        (tree, shard)
        for tree, shard in zip(jax.tree.leaves(state.optimizer), jax.tree.leaves(shardings.optimizer), strict=True)
        if tree.ndim
    ]
    assert planned.moments == sum(bytes_of(tree, shard) for tree, shard in moments)
    average = 0 if state.average is None else bytes_of(state.average, shardings.average)
    assert planned.average == average


def test_policies_keep_less_and_less() -> None:
    for precision in ("bfloat16", "fp8"):
        plans = [make_plan(plan_config(precision=precision, rematerialisation=p)) for p in ("none", "report", "full")]
        kept = [sum(plan.activations.kept.values()) for plan in plans]
        assert kept[0] > kept[1] > kept[2]


@pytest.mark.parametrize(("precision", "each"), [("bfloat16", 2), ("fp8", 1 + 4 / 128)])
def test_what_a_layer_keeps_by_hand(precision: str, each: float) -> None:
    """The report's policy: latents, attention's input and output to o with the logarithms of its 128 heads' sums,
    SwiGLU's input, the router's logits."""
    plan = make_plan(plan_config(precision=precision))
    d, latents = 7168, 1536 + 576
    attention = 128 * 128 * (1.5 + 4 / 128 if precision == "fp8" else 2)
    common = 2 * (2 * d + latents) + attention + 4 * 128
    assert plan.activations.kept_per_layer["dense"] == 4096 * (common + 2 * 18432 * each)
    assert plan.activations.kept_per_layer["moe"] == 4096 * (common + 2 * 2048 * each + 256 * 4)
    assert plan.activations.kept_per_layer["mtp"] == plan.activations.kept_per_layer["moe"] + 4096 * 2 * d * 2


def test_a_rank_of_the_tensor_axis_keeps_its_heads_and_widths() -> None:
    """Four ranks, from blocks traced for one and two: what belongs to heads and widths is a quarter."""
    mesh = MeshConfig(fsdp=8, expert=64, tensor=4)
    plan = make_plan(plan_config(mesh=mesh))
    shared = 2 * (2 * 7168 + 1536 + 576)
    of_heads_and_width = 128 * (2 * 128 + 4) + 2 * 2 * 18432
    assert plan.activations.kept_per_layer["dense"] == 4096 * (shared + of_heads_and_width / 4)


def test_kept_bytes_grow_with_the_micro_batch() -> None:
    one = make_plan(plan_config(rematerialisation="report"))
    two = make_plan(plan_config(rematerialisation="report", micro_batch_size=2))
    assert sum(two.activations.kept.values()) == 2 * sum(one.activations.kept.values())


@pytest.mark.parametrize("policy", ["none", "report", "full"])
@pytest.mark.parametrize(
    ("target", "attention", "tiles", "backward"),
    [
        ("h100:2048", "scan", 8, 5),
        ("h100:2048", "cudnn", 32, 5),
        ("h100:2048", "auto", 32, 7),
        ("v5p:2048", "auto", 8, 7),
        ("v5p:2048", "cudnn", 8, 7),  # as auto where there is no GPU
    ],
)
def test_attention_is_computed_in_tiles(target: str, attention: str, tiles: int, backward: int, policy: str) -> None:
    """Two products per tile forward, again where the layer is; kernels compute two of five backward products twice.

    Under the report's policy kernels keep their result, as `backward` of 7 says here, and do not run again.
    """
    forward = 2 if policy == "none" or (policy == "report" and backward == 7) else 4
    config = plan_config(
        model=V3.replace(v_head_dim=V3.qk_head_dim),
        target=Target.parse(target),
        attention=attention,
        rematerialisation=policy,
    )
    causal = operations_without_recomputation(config).attention / 6  # a product of what is on and below the diagonal
    assert operations(config).attention == pytest.approx((forward + backward) * causal * (tiles + 1) / tiles)


def test_widths_without_a_kernel_are_computed_by_plain_products() -> None:
    narrow = V3.replace(qk_nope_head_dim=120)
    forms = [attention_form(plan_config(model=model, precision="bfloat16")) for model in (V3, narrow)]
    assert forms == ["hopper", "scan"]
    assert attention_form(plan_config(precision="float32")) == "scan"


def test_cudnn_keeps_wide_values_and_repeated_keys() -> None:
    """The widths of queries, keys, values and result are 192 each, instead of 192, 128, 128 and 128 and 64 shared."""
    one = make_plan(plan_config(rematerialisation="none", attention="auto")).activations
    two = make_plan(plan_config(rematerialisation="none", attention="cudnn")).activations
    more = one.kept_per_layer["moe"] - two.kept_per_layer["moe"]
    assert more == pytest.approx(-4096 * 2 * (128 * (64 + 64 + 64) - 64))


def test_what_fsdp_gathers() -> None:
    """Routers as stored, linear maps and experts in FP8 with a scale per block or in bfloat16; no embedding."""
    experts, linear = 59 * 4 * 3 * 7168 * 2048, 62 * 187_105_280 + 59 * 3 * 7168 * 2048 + 3 * 3 * 7168 * 18432
    plain = 129280 * 7168 + 2 * 7168**2  # head, and the MTP module's projection
    for precision, width in (("bfloat16", 2), ("fp8", 1 + 4 / 128**2)):
        flows = {flow.what: flow.sent for flow in make_plan(plan_config(precision=precision)).flows}
        whole = 4 * 59 * 256 * 7168 + width * (experts + linear) + 2 * plain
        assert flows["weights gathered"] == pytest.approx(2 * 31 / 32 * whole)
        assert flows["gradients summed"] == pytest.approx(31 / 32 * 4 * (experts + 59 * 256 * 7168 + linear + plain))


@pytest.mark.parametrize(("precision", "there"), [("bfloat16", 2), ("fp8", 1 + 4 / 128), ("fp8,dispatch=false", 2)])
def test_a_token_crosses_once_to_each_of_its_groups(precision: str, there: float) -> None:
    """64 ranks, eight in each of eight groups and nodes: four rows between nodes, one per expert within."""
    config = plan_config(precision=precision)
    flow = next(flow for flow in make_plan(config).flows if "experts" in flow.what)
    row = 7168 * (3 * there + 2 * 2) + 8 * 5 * 4  # five numbers beside it for each of its experts
    tokens = 4096 * (58 + 1)
    between, within = (tokens * copies * 7 / 8 * row for copies in (4, 8))
    assert flow.seconds * config.target.accelerator.outer_link == pytest.approx(between)
    assert flow.sent == pytest.approx(between + within)


@pytest.mark.parametrize("zero", [True, False])
def test_replicas_sum_gradients_and_gather_new_weights(zero: bool) -> None:
    """One MoE layer's weights of float32 on 4 replicas: an all-reduce, and with ZeRO an all-gather more."""
    config = plan_config(
        model=SMALL, target=Target.parse("h100:4"), mesh=MeshConfig(data=4), zero=zero, sequence_length=64
    )
    counts = count_parameters(SMALL)
    biases = SMALL.n_routed_experts * SMALL.has_router_bias * (SMALL.num_moe_layers + 1)
    (flow,) = (flow for flow in make_plan(config).flows if "replicas" in flow.what)
    assert flow.sent == pytest.approx(4 * (counts.total + counts.mtp_total - biases) * 3 / 4 * (2 + zero))


# Options, advice, search ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["nano", "1b", "v3-671b"])
def test_a_plan_starts_from_the_defaults_of_train(preset: str) -> None:
    run = default_run(preset)
    config = of_preset(preset, Target.parse("h200:1"), MeshConfig())
    same = ("batch_size", "rematerialisation", "pipeline_schedule", "zero", "moment_dtype", "ema_decay", "loss_chunk")
    for name in same:
        assert getattr(config.run.training, name) == getattr(run.training, name), name
    assert config.run.data.sequence_length == run.data.sequence_length
    assert config.run.training.rows_per_pass == run.training.rows_per_pass
    assert config.precision == "bfloat16"


def test_a_batch_that_does_not_divide_becomes_one_that_does() -> None:
    target = Target.parse("h200:2048")
    assert of_preset("v3-671b", target, MeshConfig(fsdp=32, expert=64)).batch_size == 2048
    staged = of_preset("v3-671b", target, MeshConfig(stage=8, expert=4, data=16, tensor=4), schedule="1f1b")
    assert (staged.batch_size, staged.micro_batch_size) == (256, 4)
    with pytest.raises(ConfigError, match="2048"):
        of_preset("v3-671b", target, MeshConfig(fsdp=32, expert=64), batch_size=256)


def broken() -> Plan:
    return make_plan(
        plan_config(
            target=Target.parse("h800:256"),
            mesh=MeshConfig(fsdp=4, expert=64),
            average="device",
            zero=False,
            micro_batch_size=2,
        )
    )


def test_advice_names_options_of_train_and_says_what_they_do(capsys: pytest.CaptureFixture[str]) -> None:
    plan = broken()
    assert plan.spare < 0
    advice = {item.change: item for item in advise(plan)}
    full = advice["--training.rematerialisation full"]
    turned = make_plan(dataclasses.replace(plan.config, rematerialisation="full"))
    assert full.saved == pytest.approx(plan.memory - turned.memory)
    assert full.fits is turned.fits
    assert {"--precision fp8", "--training.zero", "--training.ema-decay 0", "--training.moment-dtype bfloat16"} <= set(
        advice
    )
    all_options = [word for item in plan.config.train_options.items() for word in item if word]
    for options in [all_options, *(change[change.index("--") :].split() for change in advice)]:
        assert main(["train", "--preset", "v3-671b", *options]) == 2
        assert "--out is missing" in capsys.readouterr().err  # all else is as dsv3 train wants it


def test_search_compares_runs_of_one_batch() -> None:
    found = search("ablation-16b", Target.parse("h100:16"), 100)
    assert {candidate.plan.config.batch_size for candidate in found} == {256}
    fits = [candidate.fits for candidate in found]
    assert fits == sorted(fits, reverse=True)
    devices = [math.prod(mesh.sizes.values()) for mesh in meshes(V3, 16, 4096)]
    assert set(devices) == {16}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": MeshConfig(fsdp=3)}, "2048"),
        ({"target": Target.parse("h200:896"), "mesh": MeshConfig(fsdp=128, expert=7)}, "mesh.expert"),
        ({"batch_size": 2049}, "2048"),
        ({"mesh": MeshConfig(stage=16, fsdp=2, expert=64), "batch_size": 128 * 31}, "dualpipe"),
        ({"precision": "int4"}, "precision"),
        ({"rematerialisation": "some"}, "rematerialisation"),
        ({"average": "host"}, "average"),
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
