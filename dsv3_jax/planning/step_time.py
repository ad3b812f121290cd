"""How long a step takes at least: rooflines of products, memory and links, and the pipeline's bubble.

Three figures, never mixed: at the hardware's peaks; at what the best kernels are known to reach of them; and with the
same distance to the second that the report's own run had (`dsv3_jax.planning.published`).
"""

from __future__ import annotations

import dataclasses
from collections import Counter

from dsv3_jax.planning.activations import kept_of_layer
from dsv3_jax.planning.config import PlanConfig
from dsv3_jax.planning.hardware import Accelerator
from dsv3_jax.planning.layers import LayerKind
from dsv3_jax.planning.operations import operations
from dsv3_jax.planning.stage_time import idle_in_ticks, stage_memory_traffic, waiting_ticks
from dsv3_jax.planning.stage_traffic import IN_TICKS
from dsv3_jax.planning.state_memory import StateMemory
from dsv3_jax.planning.traffic import REPLICAS, TENSOR_SUMS, TOKENS, Traffic

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
    passes = float(_MEMORY_PASSES)
    if config.has_pipelined_step:
        moved, passes = stage_memory_traffic(config)
    memory = passes * moved * config.tokens_a_pass * config.passes / bandwidth
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
    end of a step stand in the way. What is hidden can hide behind computation only as far as there is any. The training
    step with stages hides nothing, and in a tick all ranks wait for the one that sends longest.
    """
    if config.has_pipelined_step:
        return sum(flow.seconds * (waiting_ticks(config) if flow.what in IN_TICKS else 1) for flow in flows)
    dualpipe = config.mesh.stage > 1 and config.schedule == "dualpipe"
    open_whats = {TENSOR_SUMS, REPLICAS}
    if not dualpipe:
        open_whats.add(TOKENS)
    exposed = sum(flow.seconds for flow in flows if flow.what in open_whats)
    hidden = sum(flow.seconds for flow in flows if flow.what not in open_whats)
    return exposed + max(hidden - computing, 0.0)


def bubble_fraction(config: PlanConfig) -> float:
    """Idle time over busy time: in the step as its ticks have it (`stage_time`); in the report's layout by table 2.

    There with chunk times F = 1, B = 2 of which W = 1, F beside B = 3.
    """
    stages = config.mesh.stage
    if stages == 1:
        return 0.0
    if config.has_pipelined_step:
        return idle_in_ticks(config)
    idle = {"dualpipe": (stages / 2 - 1) * (3 + 2 - 3), "zb1p": (stages - 1) * (1 + 2 - 2), "1f1b": (stages - 1) * 3}
    return idle[config.schedule] / (3 * config.passes)
