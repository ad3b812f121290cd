"""How long a step takes at least: rooflines of products, memory and links, and the pipeline's bubble.

Three figures, never mixed: at the hardware's peaks; at what the best kernels are known to reach of them; and with the
same distance to the second that the report's own run had (`dsv3_jax.planning.published`).
"""

from __future__ import annotations

import dataclasses
from collections import Counter

from dsv3_jax.counts import count_flops
from dsv3_jax.planning.activations import kept_of_layer
from dsv3_jax.planning.config import PlanConfig
from dsv3_jax.planning.hardware import Accelerator
from dsv3_jax.planning.layers import LayerKind
from dsv3_jax.planning.state_memory import StateMemory
from dsv3_jax.planning.traffic import Traffic

_FORWARD_AND_BACKWARD = 3
_ATTENTION_REACHED = 0.65  # of what plain products reach: softmax stands between the two products
_MEMORY_PASSES = 6  # written and read forward, read and written backward for itself and its gradient
_OPTIMIZER_PASSES = 2  # masters and moments are read and written, gradients read twice


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of a step.

    Attributes:
      fp8_products, products, attention: of matrix products, recomputation included.
      memory: traffic of everything that is not a product.
      optimizer: of the update at the end of the step.
      exposed: communication that computation does not hide.
      bubble: idle time of the pipeline.
    """

    fp8_products: float
    products: float
    attention: float
    memory: float
    optimizer: float
    exposed: float
    bubble: float

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Operations:
    """Floating point operations a device makes in a step, by where they run; recomputation included."""

    fp8_products: float
    products: float
    attention: float

    @property
    def total(self) -> float:
        return self.fp8_products + self.products + self.attention


def operations(config: PlanConfig, *, once: bool = False) -> Operations:
    """Of the whole step, divided evenly over the devices; with `once`, without what is recomputed."""
    model, policy = config.model, config.rematerialisation
    counts = count_flops(model, config.sequence_length)
    terms = dict(counts.terms)
    attention, head, router = (terms.pop(name) for name in ("attention_core", "head", "router"))
    layers = model.num_hidden_layers
    mtp = model.num_nextn_predict_layers
    linear = sum(terms.values())
    if mtp:
        share = (counts.mtp_forward - mtp * head - mtp * 4.0 * model.hidden_size**2) / mtp - attention / layers
        linear += mtp * share
        attention += mtp * attention / layers
        head += mtp * (head + 4.0 * model.hidden_size**2)
    recomputed = {"none": 0.0, "report": _up_projections(config), "products": _routed(terms), "full": linear}[policy]
    if config.spreads_experts and policy in ("none", "report"):
        recomputed += _routed(terms)
    a_device = config.tokens_a_step / config.target.devices
    if once:
        recomputed = 0.0
    linear_all = a_device * (_FORWARD_AND_BACKWARD * linear + recomputed)
    plain = a_device * _FORWARD_AND_BACKWARD * (head + router)
    core = a_device * attention * (_FORWARD_AND_BACKWARD + (0 if once else 1))  # its logits are never kept
    if config.formats.is_fp8:
        return Operations(fp8_products=linear_all, products=plain, attention=core)
    return Operations(fp8_products=0.0, products=linear_all + plain, attention=core)


def _up_projections(config: PlanConfig) -> float:
    """Operations a token to make queries, keys and values from their latents anew."""
    model = config.model
    queries = model.num_attention_heads * model.qk_head_dim * (model.q_lora_rank or model.hidden_size)
    keys = model.num_attention_heads * (model.qk_nope_head_dim + model.v_head_dim) * model.kv_lora_rank
    return 2.0 * (queries + keys) * (model.num_hidden_layers + model.num_nextn_predict_layers)


def _routed(terms: dict[str, float]) -> float:
    return terms["routed_experts"]


def step_time(
    config: PlanConfig,
    layers: Counter[LayerKind],
    state: StateMemory,
    flows: list[Traffic],
    *,
    peaks: bool,
    copies: int,
) -> StepTime:
    """Of a rank that holds these layers.

    Args:
      peaks: at the hardware's peaks, instead of at what good kernels reach.
      copies: as in `traffic`.
    """
    accelerator = config.target.accelerator
    reached = _Reached.peaks() if peaks else _Reached.of(accelerator)
    work = operations(config)
    fp8 = work.fp8_products / (accelerator.fp8_flops * reached.fp8)
    products = work.products / (accelerator.flops * reached.products)
    attention = work.attention / (accelerator.flops * reached.attention)
    bandwidth = accelerator.bandwidth * reached.bandwidth
    moved = sum(count * sum(kept_of_layer(config, kind, "none").values()) for kind, count in layers.items()) / copies
    memory = _MEMORY_PASSES * moved * config.tokens_a_pass * config.passes / bandwidth
    update = _OPTIMIZER_PASSES * (state.masters + state.moments) + state.gradients + state.working_weights
    computing = fp8 + products + attention + memory
    return StepTime(
        fp8_products=fp8,
        products=products,
        attention=attention,
        memory=memory,
        optimizer=update / bandwidth,
        exposed=exposed_communication(config, flows, computing),
        bubble=computing * bubble_fraction(config),
    )


@dataclasses.dataclass(frozen=True)
class _Reached:
    fp8: float
    products: float
    attention: float
    bandwidth: float

    @classmethod
    def peaks(cls) -> _Reached:
        return cls(1.0, 1.0, 1.0, 1.0)

    @classmethod
    def of(cls, accelerator: Accelerator) -> _Reached:
        plain = accelerator.flops_reached
        return cls(accelerator.fp8_reached, plain, plain * _ATTENTION_REACHED, accelerator.bandwidth_reached)


def exposed_communication(config: PlanConfig, flows: list[Traffic], computing: float) -> float:
    """Communication that computation does not hide.

    DualPipe runs one micro-batch's exchange of tokens beside the other's computation; FSDP's gathers and a pipeline's
    hand-overs run ahead of their use. Tensor sums, an exchange of tokens without DualPipe, and what happens once at the
    end of a step stand in the way. What is hidden can hide behind computation only as far as there is any.
    """
    dualpipe = config.mesh.stage > 1 and config.schedule == "dualpipe"
    open_whats = {"sums of partial results", "replicas' gradients and weights"}
    if not dualpipe:
        open_whats.add("tokens to experts and back")
    exposed = sum(flow.seconds for flow in flows if flow.what in open_whats)
    hidden = sum(flow.seconds for flow in flows if flow.what not in open_whats)
    return exposed + max(hidden - computing, 0.0)


def bubble_fraction(config: PlanConfig) -> float:
    """Idle time over busy time (table 2): chunk times F = 1, B = 2 of which W = 1, F beside B = 3."""
    stages = config.mesh.stage
    if stages == 1:
        return 0.0
    idle = {"dualpipe": (stages / 2 - 1) * (3 + 2 - 3), "zb1p": (stages - 1) * (1 + 2 - 2), "1f1b": (stages - 1) * 3}
    return idle[config.schedule] / (3 * config.passes)
