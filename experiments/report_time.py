"""What a device of the report's run sends in a step, and how long a step takes (sections 3.2.1, 3.2.2)."""

from __future__ import annotations

from collections import Counter, defaultdict

from report_memory import FORMATS, WIDE, copies_of_layers, groups_of_rank, kept_of_layer

from dsv3_jax.planning.config import PlanConfig
from dsv3_jax.planning.forward_operations import forward_operations
from dsv3_jax.planning.step_time import Reached, StepTime
from dsv3_jax.planning.traffic import HIDDEN_STATES, REPLICAS, TENSOR_SUMS, TOKENS, Traffic, flow_over
from dsv3_jax.planning.weights import LayerKind, StateMemory

_MEMORY_PASSES = 6  # activations: written and read forward; read and written backward, for themselves and gradients


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
    computed = config.tokens_per_pass * config.passes * (layers["moe"] + layers["mtp"]) / copies_of_layers(config)
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
    for group, count in groups_of_rank(config, layers):
        replicas = copies_of_layers(config) * group.replicas(config.mesh)
        back = (formats.weight if group.fp8 else formats.compute) if config.zero else WIDE
        # The slowest links decide: those of the outermost axis that the weights are replicated over.
        outermost = next((axis for axis in ("data", "expert", "tensor") if config.mesh.sizes[axis] > 1), "data")
        axis = "stage" if copies_of_layers(config) > 1 else outermost
        sent[axis] += count * group.on_a_device(config.mesh) * (1 - 1 / replicas) * (WIDE + back)
    return [flow_over(config, axis, REPLICAS, size) for axis, size in sent.items()]


def _tensor_sums(config: PlanConfig, layers: Counter[LayerKind]) -> list[Traffic]:
    """Returns four all-reduces per layer: after attention and feed-forward, forward and backward."""
    blocks = (layers["dense"] + layers["moe"] + layers["mtp"]) / copies_of_layers(config)
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
    moved *= config.tokens_per_pass * config.passes / copies_of_layers(config)
    times["memory"] = _MEMORY_PASSES * moved / bandwidth
    update = 2 * (state.masters + state.moments) + state.gradients + state.working_weights
    times["exchange"] = 0.0  # what the report's kernels read and write for it is in the fraction that its run reached
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
