"""Estimates how long a step takes: rooflines of products, memory and links, and the pipeline's bubble.

There are three estimates, which are not to be mixed: at the hardware's peaks; at what the best kernels are known to
reach of them; and as far from the second as the report's own run was (`REPORT_FRACTION`).
"""

from __future__ import annotations

import dataclasses

from dsv3_jax.planning.activations import LAYERS, working_bytes
from dsv3_jax.planning.config import PlanConfig
from dsv3_jax.planning.exchange import TokenExchange
from dsv3_jax.planning.hardware import Accelerator
from dsv3_jax.planning.operations import expert_operations, operations
from dsv3_jax.planning.stage_parts import backward_parts, bubble, layer_runs, waiting
from dsv3_jax.planning.traffic import CONTEXT_EXCHANGE, REPLICAS, TENSOR_SUMS, TOKENS, WHILE_COMPUTING, Traffic
from dsv3_jax.planning.weights import StateMemory

REPORT_FRACTION = 0.4944518052731055
"""How fast the report's run computed, as a fraction of this planner's figure for it with the best kernels known.

It stands for all that rooflines leave out: quantisation, waiting, kernels of 2024, multiprocessors lent to
communication. A careful run of 2,048 devices is known to have reached it. `experiments/report_run.py` derives it.
"""

_ATTENTION_REACHED = 0.65  # of what plain products reach, because softmax is between the two products
_OPTIMIZER_PASSES = 2  # masters and moments are read and written
_MEMORY_PASSES = 6  # activations: written and read forward; read and written backward, for themselves and gradients
_FORWARD_PASSES, _BACKWARD_PASSES = 2, 4  # the same in a stage, whose backward pass may be in two parts


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of a step.

    Attributes:
      fp8_products, products, attention: time of matrix products, recomputation included.
      memory: time of reading and writing activations.
      exchange: time of reading and writing what is sent to experts and back, and the sums of pieces' gradients.
      optimizer: time of the update at the end of the step.
      exposed: time of communication that is not hidden behind computation.
      bubble: idle time of the pipeline.
    """

    fp8_products: float
    products: float
    attention: float
    memory: float
    exchange: float
    optimizer: float
    exposed: float
    bubble: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Reached:
    """Fractions of the peaks."""

    fp8: float = 1.0
    products: float = 1.0
    attention: float = 1.0
    bandwidth: float = 1.0

    @classmethod
    def by_best_kernels(cls, accelerator: Accelerator) -> Reached:
        """Returns what the best kernels known reach on an accelerator."""
        plain = accelerator.flops_reached
        return cls(accelerator.fp8_reached, plain, plain * _ATTENTION_REACHED, accelerator.bandwidth_reached)


def step_time(config: PlanConfig, state: StateMemory, flows: list[Traffic], rank: int, reached: Reached) -> StepTime:
    """Returns the time of a step in which kernels reach these fractions of the hardware's peaks.

    Args:
      flows: what the rank `rank` of the stage axis sends.
    """
    accelerator = config.target.accelerator
    work = operations(config)
    fp8 = work.fp8_products / (accelerator.fp8_flops * reached.fp8)
    products = work.products / (accelerator.flops * reached.products)
    attention = work.attention / (accelerator.flops * reached.attention)
    bandwidth = accelerator.bandwidth * reached.bandwidth
    memory = _activation_traffic(config) / bandwidth
    update = _OPTIMIZER_PASSES * (state.masters + state.moments) + state.gradients + state.working_weights
    exchange = _exchange_traffic(config, rank) / bandwidth
    computing = fp8 + products + attention + memory + exchange
    return StepTime(
        fp8_products=fp8,
        products=products,
        attention=attention,
        memory=memory,
        exchange=exchange,
        optimizer=update / bandwidth,
        exposed=exposed_communication(config, flows, computing, expert_seconds(config, rank, reached) + exchange),
        bubble=computing * bubble(config) if config.has_stages else 0.0,
    )


def _activation_traffic(config: PlanConfig) -> float:
    """Returns the bytes of activations that a rank reads and writes in a step."""
    model = config.model
    counts = {"dense": model.num_dense_layers, "moe": model.num_moe_layers, "mtp": model.num_nextn_predict_layers}
    computed = sum(counts[kind] * working_bytes(config, kind) for kind in LAYERS if counts[kind]) * config.passes
    if not config.has_stages:
        return _MEMORY_PASSES * computed
    return (_FORWARD_PASSES + _BACKWARD_PASSES * backward_parts(config)) * computed / config.mesh.stage


def _exchange_traffic(config: PlanConfig, rank: int) -> float:
    """Returns the bytes that a rank of the stage axis reads and writes in a step for the exchange of tokens."""
    exchange, runs = TokenExchange.of(config), layer_runs(config)[rank]
    forward, backward = (of.get("moe", 0) + of.get("mtp", 0) for of in (runs.forward, runs.backward))
    return forward * exchange.moved(backward=False) + backward * exchange.moved(backward=True)


def expert_seconds(config: PlanConfig, rank: int, reached: Reached) -> float:
    """Returns the seconds for which a rank of the stage axis computes routed experts while it exchanges tokens."""
    accelerator, fp8 = config.target.accelerator, config.recipe.fp8 is not None
    rate = accelerator.fp8_flops * reached.fp8 if fp8 else accelerator.flops * reached.products
    return expert_operations(config, rank) / rate


def exposed_communication(config: PlanConfig, flows: list[Traffic], computing: float, experts: float) -> float:
    """Returns the seconds of communication that computation does not hide.

    Without stages, FSDP's gathers and sums run beside the computation of other layers, as long as there is any. Tensor
    sums, the exchanges of latents and attention's outputs, and what happens once at the end of a step stop the
    computation. The exchange of tokens runs beside the products of experts (`_exposed_tokens`). Of the rest a pipelined
    step hides nothing, and in a tick all ranks wait for the one that sends longest.

    Args:
      computing: seconds of all computation.
      experts: seconds of the products of routed experts, and of what is read and written for the exchange.
    """
    tokens = sum(flow.seconds for flow in flows if flow.what == TOKENS)
    exposed_tokens = _exposed_tokens(config, tokens, experts)
    others = [flow for flow in flows if flow.what != TOKENS]
    if config.has_stages:
        in_ticks = exposed_tokens + sum(flow.seconds for flow in others if flow.what in WHILE_COMPUTING)
        return in_ticks * waiting(config) + sum(flow.seconds for flow in others if flow.what not in WHILE_COMPUTING)
    waited_for = (TENSOR_SUMS, CONTEXT_EXCHANGE, REPLICAS)
    exposed = exposed_tokens + sum(flow.seconds for flow in others if flow.what in waited_for)
    hidden = tokens - exposed_tokens + sum(flow.seconds for flow in others if flow.what not in waited_for)
    return exposed + max(hidden - computing, 0.0)


def _exposed_tokens(config: PlanConfig, seconds: float, experts: float) -> float:
    """Returns the exposed part of the seconds for which tokens are exchanged (`sharding.expert_stages`).

    Tokens go through the experts in pieces. While one piece is multiplied the others are sent, but for as many pieces
    as there are hops, which are sent before the first product or behind the last. So products, and the passes over
    buffers around them, hide at most the time that they take. Schedules of XLA's GPU compiler show this
    (`planning.overlap`); for other hardware nothing is taken as hidden, because its schedules cannot be read.
    """
    exchange = TokenExchange.of(config)
    if config.target.accelerator.platform != "gpu" or not exchange.hops:
        return seconds
    return seconds - min(seconds * max(1 - len(exchange.hops) / exchange.pieces, 0.0), experts)
