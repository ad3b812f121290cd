"""Bytes a device sends in a step, by mesh axis (report sections 3.2.1 to 3.2.3)."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict

from dsv3_jax.planning.config import PlanConfig
from dsv3_jax.planning.layers import LayerKind
from dsv3_jax.planning.precision_bytes import width_of
from dsv3_jax.planning.state_memory import gathered_width, groups_of
from dsv3_jax.sharding.expert_layout import hops_between

_AXES = ("stage", "data", "fsdp", "expert", "tensor")
TOKENS = "tokens to experts and back"
WEIGHTS_GATHERED = "weights gathered"
GRADIENTS_SUMMED = "gradients summed"
TENSOR_SUMS = "sums of partial results"
REPLICAS = "replicas' gradients and weights"
HIDDEN_STATES = "hidden states and gradients"
_WIDE = 4  # bytes of a scale, of a gate, and of an expert's number


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one axis carries.

    Attributes:
      axis: of the mesh.
      what: which collectives, for what.
      sent: bytes a device sends in a step.
      seconds: at the bandwidth of the links the axis runs over.
      between_nodes: whether those leave the node.
    """

    axis: str
    what: str
    sent: float
    seconds: float
    between_nodes: bool


def leaves_node(config: PlanConfig, axis: str) -> bool:
    """Whether neighbours on this axis may be in different nodes: the last axes lie closest together."""
    span = 1
    for name in reversed(_AXES):
        span *= getattr(config.mesh, name)
        if name == axis:
            return span > config.target.accelerator.node
    raise ValueError(f"no axis {axis}")


def traffic(config: PlanConfig, layers: Counter[LayerKind], *, copies: int = 1) -> list[Traffic]:
    """Of a rank that holds these layers, `copies` ranks of the stage axis holding the same.

    Of the step with stages see `stage_traffic`.
    """
    found = [
        *_experts(config, layers, copies),
        *_shards(config, layers),
        *_replicas(config, layers, copies),
        *_tensor(config, layers, copies),
        *_stages(config),
    ]
    return [item for item in found if item.sent]


def flow_over(config: PlanConfig, axis: str, what: str, sent: float, *, in_node: float = 0.0) -> Traffic:
    """`sent` bytes over the axis's links; `in_node` more, which go over the fast links at the same time."""
    accelerator, outside = config.target.accelerator, leaves_node(config, axis)
    seconds = sent / (accelerator.outer_link if outside else accelerator.inner_link)
    return Traffic(axis, what, sent + in_node, max(seconds, in_node / accelerator.inner_link), outside)


def _experts(config: PlanConfig, layers: Counter[LayerKind], copies: int) -> list[Traffic]:
    """All-to-all of tokens to their experts and back, forward and backward.

    A token crosses once to each of at most `topk_group` nodes, and goes on inside to its experts (section 3.2.2), in
    FP8 on the way there where the recipe says so.
    """
    size, model, formats = config.mesh.expert, config.model, config.formats
    moe_layers = (layers["moe"] + layers["mtp"]) / copies
    if size == 1 or not moe_layers:
        return []
    tokens = config.tokens_a_pass * config.passes * moe_layers
    if config.is_training_step:
        return [tokens_over_hops(config, tokens, tokens)]
    nodes = max(size * config.mesh.tensor // config.target.accelerator.node, 1)
    passes = 3 if config.rematerialisation == "full" else 2  # forward and gradients; without a cache once more
    width = model.hidden_size * (passes * formats.dispatch + 2 * formats.combine) / config.mesh.tensor
    chosen = model.num_experts_per_tok
    reached = min(chosen, model.topk_group if nodes <= model.n_group else nodes)
    if nodes == 1:
        return [flow_over(config, "expert", TOKENS, tokens * width * chosen * (1 - 1 / size))]
    outside = tokens * width * reached * (1 - 1 / nodes)
    return [flow_over(config, "expert", TOKENS, outside, in_node=tokens * width * chosen)]


def tokens_over_hops(config: PlanConfig, forward: float, backward: float) -> Traffic:
    """As `sharding.expert_parallel` has it: one row to every rank on each hop at most, and the sum of its results back.

    Forward once there and back; in a backward pass twice there (tokens anew, and gradients of the results) and once
    back. Beside a token travel every expert's number and gate, and back the gate's gradient; beside FP8 rows their
    scales.

    Args:
      forward, backward: rows of all layers and micro-batches that pass forward, and backward.
    """
    model, formats = config.model, config.formats
    chosen = model.num_experts_per_tok
    values = 1 if formats.is_fp8 else formats.compute
    scales = model.hidden_size * (formats.dispatch - values) / _WIDE
    there = model.hidden_size * values + _whole_rows(config, scales + 2 * chosen) * _WIDE
    back = model.hidden_size * formats.combine
    gradients = model.hidden_size * values + _whole_rows(config, scales) * _WIDE
    sent = forward * (there + back)
    sent += backward * (there + gradients + back + _whole_rows(config, chosen) * _WIDE)
    near = max(config.target.accelerator.node // config.mesh.tensor, 1)  # ranks of the axis in a node
    outside = inside = 0.0
    rows = 1
    for hop in hops_between(config.mesh.expert, model.n_group, model.topk_group):
        rows = min(rows * hop.copies(chosen), chosen)
        together = min(hop.peers, max(near // hop.stride, 1))  # peers in one node
        outside += sent * rows * (1 - together / hop.peers)
        inside += sent * rows * (together - 1) / hop.peers
    if not outside:
        return flow_over(config, "expert", TOKENS, inside)
    return flow_over(config, "expert", TOKENS, outside, in_node=inside)


def _whole_rows(config: PlanConfig, numbers: float) -> float:
    """So many numbers a row as a TPU moves them: in whole rows of its 128 lanes."""
    return -(-numbers // 128) * 128 if config.target.accelerator.platform == "tpu" else numbers


def _shards(config: PlanConfig, layers: Counter[LayerKind]) -> list[Traffic]:
    """FSDP: weights are gathered for the forward and for the backward pass, gradients summed into shards."""
    size = config.mesh.fsdp
    if size == 1:
        return []
    share, weights, gradients = 1 - 1 / size, 0.0, 0.0
    for group, count in groups_of(config, layers):
        travels = not config.is_training_step or group.name != "embedding"  # of whose table the step moves rows
        if "fsdp" in group.axes and travels:
            whole = count * group.on_a_device(config.mesh) * size
            weights += 2 * whole * gathered_width(config, group)
            gradients += whole * width_of(config.gradient_dtype)
    return [
        flow_over(config, "fsdp", WEIGHTS_GATHERED, config.passes * share * weights),
        flow_over(config, "fsdp", GRADIENTS_SUMMED, config.passes * share * gradients),
    ]


def _replicas(config: PlanConfig, layers: Counter[LayerKind], copies: int) -> list[Traffic]:
    """Once a step: gradients summed over replicas, and the new weights back (the two halves of an all-reduce)."""
    formats = config.formats
    sent: dict[str, float] = defaultdict(float)
    for group, count in groups_of(config, layers):
        replicas = copies * group.replicas(config.mesh)
        back = (formats.weight if group.fp8 else formats.compute) if config.zero else width_of(config.gradient_dtype)
        one_way = count * group.on_a_device(config.mesh) * (1 - 1 / replicas)
        # The slowest links on the way decide; that is the outermost axis it is replicated over.
        outermost = next(
            (axis for axis in _AXES[1:] if axis not in group.axes and getattr(config.mesh, axis) > 1), None
        )
        axis = "stage" if copies > 1 else outermost or "data"
        sent[axis] += one_way * (width_of(config.gradient_dtype) + back)
    return [flow_over(config, axis, REPLICAS, size) for axis, size in sent.items()]


def _tensor(config: PlanConfig, layers: Counter[LayerKind], copies: int) -> list[Traffic]:
    """Sums behind attention and feed-forward, forward and backward: four all-reduces a layer."""
    size = config.mesh.tensor
    blocks = (layers["dense"] + layers["moe"] + layers["mtp"]) / copies
    tokens = config.tokens_a_pass * config.passes
    sent = tokens * blocks * 4 * 2 * (1 - 1 / size) * config.model.hidden_size * config.formats.compute
    return [flow_over(config, "tensor", TENSOR_SUMS, sent)]


def _stages(config: PlanConfig) -> list[Traffic]:
    """Hidden states on to the next stage and gradients back."""
    if config.mesh.stage == 1:
        return []
    tokens = config.tokens_a_pass * config.passes
    sent = 2 * tokens * config.model.hidden_size * config.formats.compute / config.mesh.tensor
    return [flow_over(config, "stage", HIDDEN_STATES, sent)]
