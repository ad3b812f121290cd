"""Calculates the bytes that a device sends in a step, by mesh axis (report sections 3.2.1 to 3.2.3).

What layers need is sent whenever they are computed: forward once, and again in each part of a backward pass. What
belongs to weights is sent once per step.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict

from dsv3_jax.pipeline.facts import ScheduleFacts, schedule_facts
from dsv3_jax.planning.activations import LAYERS, gathered_weights, latent_bytes
from dsv3_jax.planning.config import PlanConfig
from dsv3_jax.planning.stage_parts import LayerRuns, layer_runs
from dsv3_jax.planning.weights import stages_per_rank, weights_of
from dsv3_jax.precision.dispatch import DispatchFormat, dispatch_formats
from dsv3_jax.sharding.expert_layout import hops_between
from dsv3_jax.sharding.mesh import AXES

TOKENS = "tokens to experts and back"
WEIGHTS_GATHERED = "weights gathered"
GRADIENTS_SUMMED = "gradients summed"
TENSOR_SUMS = "sums of partial results"
CONTEXT_EXCHANGE = "latents to heads, outputs to tokens"
REPLICAS = "replicas' gradients and weights"
HIDDEN_STATES = "hidden states and gradients"
VOCABULARY = "embeddings, heads' hidden states"
STAGE_WEIGHTS = "weights to stages, gradients back"
OPPOSITE_WEIGHTS = "opposite stages' weights, gradients"
WHILE_COMPUTING = {TOKENS, WEIGHTS_GATHERED, GRADIENTS_SUMMED, TENSOR_SUMS, CONTEXT_EXCHANGE}
"""What a rank sends while it computes a layer."""

_FLOAT32 = 4  # bytes of a scale, of a gate, of an expert's number, and of a gradient
_TPU_LANES = 128


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The bytes of one kind that a device sends over one mesh axis.

    Attributes:
      axis: the mesh axis.
      what: what is sent.
      sent: bytes that a device sends in a step.
      seconds: time of the transfer at the bandwidth of the links the axis uses.
      between_nodes: whether those links leave the node.
    """

    axis: str
    what: str
    sent: float
    seconds: float
    between_nodes: bool


def traffic(config: PlanConfig) -> tuple[int, list[Traffic]]:
    """Returns the rank of the stage axis that sends longest while it computes, and what it sends."""
    of_ranks = [_while_computing(config, runs) for runs in layer_runs(config)]
    busiest = max(range(len(of_ranks)), key=lambda rank: sum(flow.seconds for flow in of_ranks[rank]))
    found = [*of_ranks[busiest], *_once(config)]
    return busiest, [flow for flow in found if flow.sent]


def leaves_node(config: PlanConfig, axis: str) -> bool:
    """Whether neighbours on this axis may be in different nodes: those on the last axes are closest together."""
    after = AXES[AXES.index(axis) :]
    return math.prod(config.mesh.sizes[name] for name in after) > config.target.accelerator.node


def flow_over(config: PlanConfig, axis: str, what: str, sent: float, *, in_node: float = 0.0) -> Traffic:
    """Returns the flow of `sent` bytes over the axis's links, and `in_node` more over the fast links meanwhile."""
    accelerator, outside = config.target.accelerator, leaves_node(config, axis)
    seconds = sent / (accelerator.outer_link if outside else accelerator.inner_link)
    return Traffic(axis, what, sent + in_node, max(seconds, in_node / accelerator.inner_link), outside)


def _while_computing(config: PlanConfig, runs: LayerRuns) -> list[Traffic]:
    """Returns what a rank sends for its layers: tokens, FSDP's gathers and sums, and those of the two other axes."""
    flows: list[Traffic] = []
    if config.mesh.expert > 1:
        tokens = [
            config.tokens_per_pass * (of.get("moe", 0) + of.get("mtp", 0)) for of in (runs.forward, runs.backward)
        ]
        flows.append(_tokens_over_hops(config, *tokens))
    if config.mesh.weight_shards > 1:
        weights = gradients = 0.0
        for kind in (*LAYERS, "head"):
            computed = runs.forward.get(kind, 0) + runs.backward.get(kind, 0)
            if computed:
                for weight in gathered_weights(config, kind):
                    received = (1 - 1 / weight.ranks) * weight.elements
                    weights += received * weight.width * computed
                    gradients += received * _FLOAT32 * runs.by_weights.get(kind, 0)
        axis = "fsdp" if config.mesh.fsdp > 1 else "context"
        flows.append(flow_over(config, axis, WEIGHTS_GATHERED, weights))
        flows.append(flow_over(config, axis, GRADIENTS_SUMMED, gradients))
    if config.mesh.tensor > 1:
        # Behind attention and feed-forward: forward, for the gradients, and where layers are computed again.
        backward = 4 if config.rematerialisation == "full" else 2
        sums = sum(2 * runs.forward.get(kind, 0) + backward * runs.backward.get(kind, 0) for kind in LAYERS)
        flows.append(
            flow_over(config, "tensor", TENSOR_SUMS, sums * 2 * (1 - 1 / config.mesh.tensor) * config.hidden_bytes)
        )
    if config.mesh.context > 1:
        flows.append(_latents_and_outputs(config, runs))
    return flows


def _latents_and_outputs(config: PlanConfig, runs: LayerRuns) -> Traffic:
    """Returns the exchange of attention over the context axis, as `sharding.attention_on_ranks` makes it.

    A forward pass gathers the latents and exchanges the outputs; a backward pass scatters and exchanges the gradients,
    after what the rematerialisation policy does not keep was sent again.
    """
    model, policy = config.model, config.rematerialisation
    of_heads = model.num_attention_heads / config.mesh.tensor * model.v_head_dim * config.recipe.dtype.itemsize
    forward, backward = (sum(of.get(kind, 0) for kind in LAYERS) for of in (runs.forward, runs.backward))
    latents = latent_bytes(config) * (forward + backward * (1 + (policy != "none")))
    outputs = config.tokens_per_pass * of_heads * (forward + backward * (1 + (policy in ("products", "full"))))
    return flow_over(config, "context", CONTEXT_EXCHANGE, (1 - 1 / config.mesh.context) * (latents + outputs))


def _tokens_over_hops(config: PlanConfig, forward: float, backward: float) -> Traffic:
    """Returns the exchange of tokens with their experts, as `sharding.expert_parallel` makes it.

    On each hop at most one row per token is sent to every rank, and the sum of its results back. A forward pass sends
    rows and receives results. A backward pass sends the rows again and the gradients of the results, and receives the
    gradients of the rows. With a row its experts' numbers and gates are sent, and the gates' gradients back.

    Args:
      forward, backward: tokens of all layers and micro-batches, in forward and in backward passes.
    """
    model, width = config.model, config.recipe.dtype.itemsize
    chosen, back = model.num_experts_per_tok, model.hidden_size * width
    tokens, gradients = dispatch_formats(config.recipe.fp8)
    rows = _row_bytes(config, tokens, 2 * chosen)
    sent = forward * (rows + back)
    sent += backward * (rows + _row_bytes(config, gradients, 0) + back + _in_lanes(config, chosen) * _FLOAT32)
    near = max(config.target.accelerator.node // config.mesh.tensor, 1)  # ranks of the axis in a node
    outside = inside = 0.0
    copies = 1
    for hop in hops_between(config.mesh.expert, model.n_group, model.topk_group):
        copies = min(copies * hop.copies(chosen), chosen)
        together = min(hop.peers, max(near // hop.stride, 1))  # peers in one node
        outside += sent * copies * (1 - together / hop.peers)
        inside += sent * copies * (together - 1) / hop.peers
    if not outside:
        return flow_over(config, "expert", TOKENS, inside)
    return flow_over(config, "expert", TOKENS, outside, in_node=inside)


def _row_bytes(config: PlanConfig, form: DispatchFormat | None, numbers: int) -> float:
    """Returns the bytes of a hidden state on its way, and of so many numbers that are sent with it."""
    hidden = config.model.hidden_size
    if form is None:
        return hidden * config.recipe.dtype.itemsize + _in_lanes(config, numbers) * _FLOAT32
    return hidden + _in_lanes(config, hidden / form.tile + numbers) * _FLOAT32


def _in_lanes(config: PlanConfig, numbers: float) -> float:
    """Returns the numbers that are sent for so many: a TPU sends whole rows of its 128 lanes."""
    tpu = config.target.accelerator.platform == "tpu"
    return -(-numbers // _TPU_LANES) * _TPU_LANES if tpu else numbers


def _once(config: PlanConfig) -> list[Traffic]:
    """Returns what is sent once per step for weights, and in every tick of a pipeline for hidden states."""
    mesh = config.mesh
    others = 1 - 1 / mesh.stage
    exchanged = opposite = 0.0
    replicas: dict[str, float] = defaultdict(float)
    for weight in weights_of(config):
        own, both_ways = weight.exchanged, weight.working + weight.itemsize
        dimension, share = weight.stage_dimension, weight.share
        if share in ("layers", "rows") and dimension is None:
            exchanged += others * own * weight.itemsize * mesh.stage  # every rank has all of it, and of its gradient
        elif share == "columns" and dimension is None:
            exchanged += others * own * 2 * weight.itemsize  # the gradient is all-reduced
        elif share in ("rows", "last", "whole") or (share == "layers" and dimension != 0):
            exchanged += others * own * both_ways  # all-gathered and reduce-scattered, or all-reduced
        opposite += weight.opposite * both_ways
        count = math.prod(mesh.sizes[axis] for axis in weight.replicas)
        # A sum over all replicas is a reduce-scatter and an all-gather; ZeRO all-gathers the new weights beside it.
        part = weight.in_state * weight.itemsize * (1 - 1 / count)
        axis = next((axis for axis in weight.replicas if mesh.sizes[axis] > 1), "data")
        replicas[axis] += part * (2 + config.zero)
    flows = [flow_over(config, axis, REPLICAS, sent) for axis, sent in replicas.items()]
    if not config.has_stages:
        return flows
    facts = schedule_facts(config.schedule, mesh.stage, config.passes)
    return [
        flow_over(config, "stage", STAGE_WEIGHTS, exchanged),
        flow_over(config, "stage", OPPOSITE_WEIGHTS, opposite),
        *flows,
        flow_over(config, "stage", HIDDEN_STATES, facts.sends * config.hidden_bytes),
        flow_over(config, "stage", VOCABULARY, _for_vocabulary(config, facts)),
    ]


def _for_vocabulary(config: PlanConfig, facts: ScheduleFacts) -> float:
    """Returns the bytes that a rank sends for what all stages compute together (`pipeline.predictions`).

    Columns of embeddings are exchanged, and those of their gradients. Hidden states of all depths are sent to all ranks
    in parts, which are gathered; their gradients are reduce-scattered, and the parts sent back.
    """
    depths = config.model.num_nextn_predict_layers
    columns = facts.look_ups + facts.look_up_gradients + 2 * facts.predictions * (depths > 0)
    hidden = 2 * facts.predictions * (1 + depths) * (1 + stages_per_rank(config))
    return (columns + hidden) * (1 - 1 / config.mesh.stage) * config.hidden_bytes
