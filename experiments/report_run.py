"""The report's own training run, calculated: 2,048 H800s, 16 stages of DualPipe, 64-way expert parallelism, ZeRO-1.

    python experiments/report_run.py [--precision fp8|bfloat16] [--rematerialisation report|none|full]
                                     [--schedule dualpipe|zb1p|1f1b] [--no-zero]

`dsv3 plan` plans this project's training step. The report's step (sections 3.2, 3.3.3, 4.2) keeps other things in
memory: master weights are divided over all replicas, besides a working copy in the products' format; every stage keeps
the activations of all its layers, and experts keep what they were sent. This experiment calculates that run, prints it
as `dsv3 plan` prints a plan, and compares it with what is published: 2.664M GPU hours for 14.8T tokens, from which a
step of 15,360 sequences of 4,096 tokens takes 19.9 s. `dsv3_jax.planning.step_time.REPORT_FRACTION` is derived here.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter, defaultdict
from pathlib import Path

from command_line import CommandLine, folder
from rich.console import Console

from dsv3_jax.config import ModelConfig
from dsv3_jax.counts import count_parameters
from dsv3_jax.planning.activations import ActivationMemory
from dsv3_jax.planning.attention_form import attention_core_memory
from dsv3_jax.planning.config import PlanConfig
from dsv3_jax.planning.forward_operations import forward_operations
from dsv3_jax.planning.hardware import Target
from dsv3_jax.planning.plan import Plan, plan_as_dict
from dsv3_jax.planning.step_time import Reached, StepTime
from dsv3_jax.planning.traffic import HIDDEN_STATES, REPLICAS, TENSOR_SUMS, TOKENS, Traffic, flow_over
from dsv3_jax.planning.weights import LayerKind, StateMemory
from dsv3_jax.sharding.mesh import MeshConfig

GPU_HOURS = 2.664e6  # of pre-training, published
TOKENS_OF_RUN = 14.8e12
RESULTS = Path(__file__).parent / "results" / "plans" / "report-h800-2048"

_TILE = 4 / 128  # bytes of a float32 scale per number of a 1x128 tile
_WIDE = 4  # bytes of float32: gradients, masters, router logits
_MEMORY_PASSES = 6  # activations: written and read forward; read and written backward, for themselves and gradients


@dataclasses.dataclass(frozen=True, kw_only=True)
class Formats:
    """Bytes per number, scales included: products' operands and weights, and what is kept or sent (section 3.3.3)."""

    compute: float
    weight: float
    linear_input: float
    attention_output: float
    swiglu_input: float
    dispatch: float
    moment: float = 2  # bfloat16


FORMATS = {
    "bfloat16": Formats(compute=2, weight=2, linear_input=2, attention_output=2, swiglu_input=2, dispatch=2),
    "fp8": Formats(
        compute=2,
        weight=1 + 4 / 128**2,
        linear_input=1 + _TILE,
        attention_output=1.5 + _TILE,  # E5M6
        swiglu_input=1 + _TILE,
        dispatch=1 + _TILE,
    ),
}

REPORT_RUN = PlanConfig(
    model=ModelConfig.preset("v3-671b"),
    target=Target.parse("h800:2048"),
    mesh=MeshConfig(stage=16, data=2, expert=64),
    batch_size=15360,
    precision="fp8",
    average="none",  # it is in the hosts' memory
    tokens=TOKENS_OF_RUN,
)


def main(argv: list[str] | None = None) -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("--precision", choices=list(FORMATS), default="fp8")
    parser.add_argument("--rematerialisation", choices=["report", "none", "full"], default="report")
    parser.add_argument("--schedule", choices=["dualpipe", "zb1p", "1f1b"], default="dualpipe")
    parser.add_argument("--no-zero", dest="zero", action="store_false")
    parser.add_argument("--out", type=folder, default=RESULTS)
    given = vars(parser.parse_args(argv))
    out = given.pop("out")
    config = dataclasses.replace(REPORT_RUN, **given)
    plan = report_plan(config)

    from dsv3_jax.planning.picture import draw_plan
    from dsv3_jax.planning.report_table import show

    out.mkdir(parents=True, exist_ok=True)
    with (out / "plan.txt").open("w") as file:
        for console in (Console(width=110), Console(file=file, width=110)):
            show(plan, console)
            console.print(_compared_with_the_published(plan), highlight=False)
    (out / "plan.json").write_text(json.dumps(plan_as_dict(plan), indent=1) + "\n")
    draw_plan(plan, out / "plan.png")


def _compared_with_the_published(plan: ReportPlan) -> str:
    """Returns the published figures with the plan's."""
    expected = plan.expected.total
    return (
        f"In the host's memory: {plan.state.masters / 2**30:.2f} GiB of running average per device.\n"
        f"Published for this run: {GPU_HOURS:,.0f} GPU hours on {plan.config.target.devices:,} H800s, MFU 39%. It took "
        f"{GPU_HOURS / plan.device_hours(expected):.2f} times what the best kernels known would. Where these compute, "
        f"it reached {report_fraction():.4f} of their speed."
    )


class ReportPlan(Plan):
    """The plan of a run that keeps its weights and activations as the report's did, which `dsv3 train` does not."""

    @property
    def train_options(self) -> dict[str, str]:
        """None, since `dsv3 train` cannot make such a run."""
        return {}

    @property
    def at_the_reports_pace(self) -> float:
        """Seconds of a step as published, from GPU hours."""
        return GPU_HOURS * 3600 / self.config.target.devices / (TOKENS_OF_RUN / self.config.tokens_per_step)


def report_fraction() -> float:
    """Returns how fast the report's run computed, as a fraction of the speed of the best kernels known.

    Communication that is not hidden is left out of both times.
    """
    plan = report_plan(REPORT_RUN)
    exposed = plan.expected.exposed
    return (plan.expected.total - exposed) / (plan.at_the_reports_pace - exposed)


def report_plan(config: PlanConfig) -> ReportPlan:
    """Returns the plan of a run on a mesh with stages, at the rank of the stage axis that holds most."""
    ranks = rank_layers(config.model, config.mesh.stage, dualpipe=config.schedule == "dualpipe")
    memories = [(state_memory(config, layers), activation_memory(config, layers)) for layers in ranks]
    fullest = max(range(len(ranks)), key=lambda rank: memories[rank][0].total + memories[rank][1].total)
    layers, (state, activations) = ranks[fullest], memories[fullest]
    flows = traffic(config, layers)
    best = Reached.by_best_kernels(config.target.accelerator)
    bound, expected = (step_time(config, layers, state, flows, reached) for reached in (Reached(), best))
    products, core, plain = operations(config)
    once = 3 * sum(forward_operations(config.model, config.sequence_length))
    recomputed = (products + core + plain) / once - 1
    return ReportPlan(config, fullest, layers, state, activations, flows, bound, expected, recomputed)


# What a rank holds ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ParameterGroup:
    """Parameters that the same mesh axes shard; over all other axes they are replicated.

    Attributes:
      elements: how many, unsharded.
      axes: the mesh axes.
      fp8: whether the FP8 recipe multiplies with them in FP8.
    """

    name: str
    elements: int
    axes: tuple[str, ...]
    fp8: bool = False

    def on_a_device(self, mesh: MeshConfig) -> float:
        """Returns the elements of one device."""
        return self.elements / math.prod(mesh.sizes[axis] for axis in self.axes)

    def replicas(self, mesh: MeshConfig) -> int:
        """Returns the devices of one stage that hold the same elements."""
        return math.prod(size for axis, size in mesh.sizes.items() if axis not in ("stage", *self.axes))


_WHOLE, _WIDTHS, _EXPERTS = (), ("tensor",), ("expert", "tensor")


def parameter_groups(model: ModelConfig, kind: LayerKind) -> tuple[ParameterGroup, ...]:
    """Returns the groups of one layer; "mtp" is an MTP module without what it shares."""
    d = model.hidden_size
    if kind == "embedding":
        return (ParameterGroup("embedding", model.vocab_size * d, _WIDTHS),)
    if kind == "head":
        return (ParameterGroup("head", model.vocab_size * d, _WIDTHS), ParameterGroup("norms", d, _WHOLE))
    if kind == "mtp":
        joining = (ParameterGroup("mtp_projection", 2 * d * d, _WHOLE), ParameterGroup("norms", 3 * d, _WHOLE))
        return (*joining, *parameter_groups(model, "moe"))
    block = count_parameters(model).block
    norms = (model.q_lora_rank or 0) + model.kv_lora_rank
    latents = d * (norms + model.qk_rope_head_dim)
    attention = (
        ParameterGroup("norms", 2 * d + norms, _WHOLE),
        ParameterGroup("attention_latents", latents, _WHOLE, fp8=True),
        ParameterGroup("attention_heads", block.attention - latents - norms, _WIDTHS, fp8=True),
    )
    if kind == "dense":
        return (*attention, ParameterGroup("dense_feed_forward", block.dense_feed_forward, _WIDTHS, fp8=True))
    return (
        *attention,
        ParameterGroup("router", block.router, _WHOLE),
        ParameterGroup("routed_experts", model.n_routed_experts * block.routed_expert, _EXPERTS, fp8=True),
        ParameterGroup("shared_experts", block.shared_experts, _WIDTHS, fp8=True),
    )


def stage_layers(model: ModelConfig, stages: int) -> list[Counter[LayerKind]]:
    """Returns how many layers of each kind every stage holds.

    Layers are dealt out in order, equally many per stage and the rest on the last, which also has the head and the MTP
    modules. (The report does not publish its split; this is the one of arXiv 2502.07846.)
    """
    per_stage = math.ceil(model.num_hidden_layers / stages)
    result: list[Counter[LayerKind]] = []
    for stage in range(stages):
        layers = range(stage * per_stage, min((stage + 1) * per_stage, model.num_hidden_layers))
        dense = sum(layer < model.num_dense_layers for layer in layers)
        result.append(Counter({"dense": dense, "moe": len(layers) - dense}))
    result[0]["embedding"] += 1
    result[-1]["head"] += 1
    result[-1]["mtp"] += model.num_nextn_predict_layers
    return [+counter for counter in result]


def rank_layers(model: ModelConfig, stages: int, *, dualpipe: bool) -> list[Counter[LayerKind]]:
    """Returns what every rank of the stage axis holds: its stage, and under DualPipe the opposite one too (3.2.1)."""
    held = stage_layers(model, stages)
    return [own + opposite for own, opposite in zip(held, reversed(held), strict=True)] if dualpipe else held


def _copies(config: PlanConfig) -> int:
    """Returns how many ranks of the stage axis hold the same layers."""
    return 2 if config.schedule == "dualpipe" else 1


def _groups(config: PlanConfig, layers: Counter[LayerKind]) -> list[tuple[ParameterGroup, int]]:
    return [(group, count) for kind, count in layers.items() for group in parameter_groups(config.model, kind)]


def state_memory(config: PlanConfig, layers: Counter[LayerKind]) -> StateMemory:
    """Returns the bytes of a rank that holds these layers: masters and moments are divided over replicas (ZeRO-1)."""
    formats = FORMATS[config.precision]
    parameters = divided = working = 0.0
    for group, count in _groups(config, layers):
        held = count * group.on_a_device(config.mesh)
        replicas = _copies(config) * group.replicas(config.mesh) if config.zero else 1
        parameters += held
        divided += held / replicas
        if replicas > 1:
            working += held * (formats.weight if group.fp8 else formats.compute)
    return StateMemory(
        parameters=parameters,
        masters=divided * _WIDE,
        working_weights=working,
        gathered_weights=0.0,
        gradients=parameters * _WIDE,
        moments=divided * 2 * formats.moment,
        average=0.0,
    )


# Activations ----------------------------------------------------------------------------------------------------


def kept_of_layer(config: PlanConfig, kind: LayerKind, policy: str) -> dict[str, float]:
    """Returns the bytes per token that a layer keeps under a policy ("none", "report" or "full"), by what they are."""
    if kind in ("embedding", "head"):
        return {}
    model, formats, tensor = config.model, FORMATS[config.precision], config.mesh.tensor
    d, width = model.hidden_size, formats.compute
    kept = {"layer input": d * width * (2 if kind == "mtp" else 1)}  # an MTP module also keeps what it joins
    if policy == "full":
        return kept
    heads = model.num_attention_heads / tensor
    latents = (model.q_lora_rank or 0) + model.kv_lora_rank + model.qk_rope_head_dim
    kept["attention latents"] = latents * width
    kept["attention core's output"] = heads * model.v_head_dim * formats.attention_output
    kept["attention's output"] = d * width
    rows = 0 if kind == "dense" else model.num_experts_per_tok
    widths = (
        model.intermediate_size if kind == "dense" else (rows + model.n_shared_experts) * model.moe_intermediate_size
    )
    kept["SwiGLU input"] = 2 * widths / tensor * formats.swiglu_input
    if rows:
        kept["router"] = model.n_routed_experts * _WIDE
        kept["experts' output"] = rows * d * formats.compute  # for the gradients of the gates
    if policy == "none":
        # The norms' inputs in float32 and outputs, which are the linear maps' inputs, and the normed latents.
        kept["norms"] = (2 * d + latents) * (_WIDE + formats.linear_input)
        kept["queries, keys, values"] = heads * (model.qk_head_dim + model.qk_nope_head_dim + model.v_head_dim) * width
        kept["experts' input"] = rows * d * formats.linear_input
        if config.precision != "fp8":
            kept["SwiGLU output"] = widths / tensor * formats.compute
    return kept


def micro_batches_in_flight(config: PlanConfig) -> float:
    """Returns the micro-batches whose activations a rank holds of each of its layers (report, table 2).

    1F1B and ZB1P hold PP of their stage; DualPipe PP + 1 of its two stages together.
    """
    stages = config.mesh.stage
    return (stages + 1) / 2 if config.schedule == "dualpipe" else min(stages, config.passes)


def activation_memory(config: PlanConfig, layers: Counter[LayerKind]) -> ActivationMemory:
    """Returns the activations of a rank that holds these layers, at the moment it holds most."""
    tokens, in_flight = config.tokens_per_pass, micro_batches_in_flight(config)
    kept: dict[str, float] = defaultdict(float)
    per_layer: dict[LayerKind, float] = {}
    for kind, count in layers.items():
        of_layer = kept_of_layer(config, kind, config.rematerialisation)
        if of_layer:
            per_layer[kind] = tokens * sum(of_layer.values())
        for name, size in of_layer.items():
            kept[name] += count * in_flight * tokens * size
    working = max(tokens * sum(kept_of_layer(config, kind, "none").values()) for kind in layers)
    vocabulary = config.model.vocab_size / config.mesh.tensor
    return ActivationMemory(
        kept=dict(kept),
        kept_per_layer=per_layer,
        micro_batches=in_flight,
        recomputed=working + attention_core_memory(config),
        loss=(layers["head"] > 0) * 3 * tokens * vocabulary * _WIDE,  # logits, exponentials and gradient
    )


# Traffic and time -----------------------------------------------------------------------------------------------


def traffic(config: PlanConfig, layers: Counter[LayerKind]) -> list[Traffic]:
    """Returns what a rank that holds these layers sends in a step."""
    flows = [*_tokens(config, layers), *_replicas(config, layers), *_tensor_sums(config, layers)]
    sent = 2 * config.passes * config.hidden_bytes / config.mesh.tensor
    flows.append(flow_over(config, "stage", HIDDEN_STATES, sent))
    return [flow for flow in flows if flow.sent]


def _tokens(config: PlanConfig, layers: Counter[LayerKind]) -> list[Traffic]:
    """Returns the all-to-all of tokens to their experts and back, forward and backward (section 3.2.2).

    A token is sent once to each of at most `topk_group` nodes, and inside the node to its experts.
    """
    size, model, formats = config.mesh.expert, config.model, FORMATS[config.precision]
    computed = config.tokens_per_pass * config.passes * (layers["moe"] + layers["mtp"]) / _copies(config)
    if size == 1 or not computed:
        return []
    nodes = max(size * config.mesh.tensor // config.target.accelerator.node, 1)
    dispatched = 3 if config.rematerialisation == "full" else 2  # forward and gradients; recomputed once more
    width = model.hidden_size * (dispatched * formats.dispatch + 2 * formats.compute) / config.mesh.tensor
    chosen = model.num_experts_per_tok
    if nodes == 1:
        return [flow_over(config, "expert", TOKENS, computed * width * chosen * (1 - 1 / size))]
    reached = min(chosen, model.topk_group if nodes <= model.n_group else nodes)
    outside = computed * width * reached * (1 - 1 / nodes)
    return [flow_over(config, "expert", TOKENS, outside, in_node=computed * width * chosen)]


def _replicas(config: PlanConfig, layers: Counter[LayerKind]) -> list[Traffic]:
    """Returns what is sent once per step: gradients reduce-scattered over replicas, and new weights all-gathered."""
    formats = FORMATS[config.precision]
    sent: dict[str, float] = defaultdict(float)
    for group, count in _groups(config, layers):
        replicas = _copies(config) * group.replicas(config.mesh)
        back = (formats.weight if group.fp8 else formats.compute) if config.zero else _WIDE
        # The slowest links decide: those of the outermost axis that the weights are replicated over.
        outermost = next((axis for axis in ("data", "expert", "tensor") if config.mesh.sizes[axis] > 1), "data")
        axis = "stage" if _copies(config) > 1 else outermost
        sent[axis] += count * group.on_a_device(config.mesh) * (1 - 1 / replicas) * (_WIDE + back)
    return [flow_over(config, axis, REPLICAS, size) for axis, size in sent.items()]


def _tensor_sums(config: PlanConfig, layers: Counter[LayerKind]) -> list[Traffic]:
    """Returns four all-reduces per layer: after attention and feed-forward, forward and backward."""
    blocks = (layers["dense"] + layers["moe"] + layers["mtp"]) / _copies(config)
    sent = config.passes * blocks * 4 * 2 * (1 - 1 / config.mesh.tensor) * config.hidden_bytes
    return [flow_over(config, "tensor", TENSOR_SUMS, sent)]


def operations(config: PlanConfig) -> tuple[float, float, float]:
    """Returns operations per token of a step: linear maps, attention core, and output head with router."""
    model = config.model
    linear, attention, plain = forward_operations(model, config.sequence_length)
    queries = model.num_attention_heads * model.qk_head_dim * (model.q_lora_rank or model.hidden_size)
    keys = model.num_attention_heads * (model.qk_nope_head_dim + model.v_head_dim) * model.kv_lora_rank
    layers = model.num_hidden_layers + model.num_nextn_predict_layers
    again = {"none": 0.0, "report": 2.0 * (queries + keys) * layers, "full": linear}[config.rematerialisation]
    return 3 * linear + again, 4 * attention, 3 * plain  # the logits of attention are always computed again


def bubble_fraction(config: PlanConfig) -> float:
    """Returns idle time over computing time (report, table 2), with chunk times F = W = 1, B = 2 and F&B = 3."""
    stages = config.mesh.stage
    idle = {"dualpipe": (stages / 2 - 1) * (3 + 2 - 3), "zb1p": (stages - 1) * (1 + 2 - 2), "1f1b": (stages - 1) * 3}
    return idle[config.schedule] / (3 * config.passes)


def step_time(
    config: PlanConfig, layers: Counter[LayerKind], state: StateMemory, flows: list[Traffic], reached: Reached
) -> StepTime:
    """Returns the time of a step in which kernels reach these fractions of the hardware's peaks.

    DualPipe computes one micro-batch while the other's tokens are exchanged, as long as there is computation.
    """
    accelerator = config.target.accelerator
    per_device = config.tokens_per_step / config.target.devices
    linear, core, plain = (per_device * term for term in operations(config))
    fp8 = linear if config.precision == "fp8" else 0.0
    times = {
        "fp8_products": fp8 / (accelerator.fp8_flops * reached.fp8),
        "products": (linear - fp8 + plain) / (accelerator.flops * reached.products),
        "attention": core / (accelerator.flops * reached.attention),
    }
    bandwidth = accelerator.bandwidth * reached.bandwidth
    moved = sum(count * sum(kept_of_layer(config, kind, "none").values()) for kind, count in layers.items())
    moved *= config.tokens_per_pass * config.passes / _copies(config)
    times["memory"] = _MEMORY_PASSES * moved / bandwidth
    update = 2 * (state.masters + state.moments) + state.gradients + state.working_weights
    computing = sum(times.values())
    always_open = {TENSOR_SUMS, REPLICAS} | (set() if config.schedule == "dualpipe" else {TOKENS})
    exposed = sum(flow.seconds for flow in flows if flow.what in always_open)
    hidden = sum(flow.seconds for flow in flows if flow.what not in always_open)
    return StepTime(
        **times,
        optimizer=update / bandwidth,
        exposed=exposed + max(hidden - computing, 0.0),
        bubble=computing * bubble_fraction(config),
    )


if __name__ == "__main__":
    main()
