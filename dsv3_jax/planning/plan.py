"""Makes a plan: what every device holds, sends and computes in a training step, without compiling anything."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

from dsv3_jax.counts import count_flops
from dsv3_jax.planning.activations import LAYERS, ActivationMemory, activation_memory, gathered_bytes
from dsv3_jax.planning.config import PlanConfig
from dsv3_jax.planning.operations import operations, operations_without_recomputation
from dsv3_jax.planning.stage_parts import bubble
from dsv3_jax.planning.step_time import (
    REPORT_FRACTION,
    Reached,
    StepTime,
    expert_seconds,
    exposed_communication,
    step_time,
)
from dsv3_jax.planning.traffic import Traffic, traffic
from dsv3_jax.planning.weights import LayerKind, StateMemory, layers_of_rank, state_memory

RESERVED = 2 * 2**30
"""Bytes that the runtime, its communication buffers and fragmentation take (0.8 to 2 GB in arXiv 2502.07846)."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """One run on one cluster.

    Attributes:
      config: what the plan is made for.
      rank: the rank of the stage axis that computes and sends most; all ranks need the same memory.
      layers: the layers that each rank holds.
      state, activations: bytes on each device.
      flows: what that rank sends in a step.
      bound: time of a step at the hardware's peaks.
      expected: time of a step with the best kernels known.
      recomputed: operations that are computed again, as a fraction of all others.
    """

    config: PlanConfig
    rank: int
    layers: Counter[LayerKind]
    state: StateMemory
    activations: ActivationMemory
    flows: list[Traffic]
    bound: StepTime
    expected: StepTime
    recomputed: float

    @property
    def memory(self) -> float:
        """Bytes that a device needs."""
        return self.state.total + self.activations.total + RESERVED

    @property
    def spare(self) -> float:
        """Bytes that a device has left; negative where the plan does not fit."""
        return self.config.target.accelerator.memory - self.memory

    @property
    def fits(self) -> bool:
        """Whether a device has the memory."""
        return self.spare >= 0

    @property
    def at_the_reports_pace(self) -> float:
        """Seconds of a step that computes as far from the best kernels as the report's run did, over the same links.

        That fraction includes what the report's run read and wrote for its exchange, so ours is not divided by it.
        """
        exchange = self.expected.exchange * (1 + (bubble(self.config) if self.config.has_stages else 0.0))
        computing = (self.expected.total - self.expected.exposed - exchange) / REPORT_FRACTION + exchange
        best = Reached.by_best_kernels(self.config.target.accelerator)
        experts = expert_seconds(self.config, self.rank, best) / REPORT_FRACTION + self.expected.exchange
        exposed = exposed_communication(self.config, self.flows, computing, experts)
        return max(computing + exposed, self.expected.total)

    @property
    def train_options(self) -> dict[str, str]:
        """Options with which `dsv3 train` makes this run."""
        return self.config.train_options

    @property
    def model_flops(self) -> float:
        """Operations of a step over the whole cluster as MFU counts them: causal, no recomputation, no MTP."""
        config = self.config
        return count_flops(config.model, config.sequence_length).training * config.tokens_per_step

    def mfu(self, seconds: float) -> float:
        """Returns the model FLOPs utilisation over the bfloat16 peak, if a step takes so long (the report: 39%)."""
        target = self.config.target
        return self.model_flops / (seconds * target.devices * target.accelerator.flops)

    def device_hours(self, seconds: float) -> float:
        """Returns the device hours of the whole run, if a step takes so long."""
        config = self.config
        return config.tokens / config.tokens_per_step * seconds * config.target.devices / 3600

    def days(self, seconds: float) -> float:
        """Returns the days of the whole run, if a step takes so long."""
        return self.device_hours(seconds) / self.config.target.devices / 24

    def tokens_per_device(self, seconds: float) -> float:
        """Returns tokens per second and device, if a step takes so long."""
        return self.config.tokens_per_step / seconds / self.config.target.devices


def make_plan(config: PlanConfig) -> Plan:
    """Returns the plan of a training step."""
    rank, flows = traffic(config)
    layers = layers_of_rank(config)
    gathered = 0.0
    # In a stage they are counted beside the activations of what it computes.
    if config.mesh.weight_shards > 1 and not config.has_stages:
        gathered = max(gathered_bytes(config, kind, ahead=1) for kind in (*LAYERS, "head") if layers[kind])
    state, activations = state_memory(config, gathered), activation_memory(config)
    best = Reached.by_best_kernels(config.target.accelerator)
    return Plan(
        config=config,
        rank=rank,
        layers=layers,
        state=state,
        activations=activations,
        flows=flows,
        bound=step_time(config, state, flows, rank, Reached()),
        expected=step_time(config, state, flows, rank, best),
        recomputed=operations(config).total / operations_without_recomputation(config).total - 1,
    )


def plan_as_dict(plan: Plan) -> dict[str, Any]:
    """Returns every figure of the plan for programs, with its unit in its name."""
    config = plan.config
    seconds = {
        "bound": plan.bound.total,
        "best_kernels": plan.expected.total,
        "at_the_reports_pace": plan.at_the_reports_pace,
    }
    times = {
        name: {
            "step_seconds": value,
            "mfu": plan.mfu(value),
            "tokens_per_second_per_device": plan.tokens_per_device(value),
            "days": plan.days(value),
            "device_hours": plan.device_hours(value),
        }
        for name, value in seconds.items()
    }
    run = config.to_json()
    model, target, mesh = (run.pop(name) for name in ("model", "target", "mesh"))
    return {
        "model": model,
        "target": {
            "name": config.target.accelerator.name,
            "devices": target["devices"],
            "topology": list(target["topology"]),
            "memory_bytes": config.target.accelerator.memory,
        },
        "mesh": mesh,
        "run": run | {"passes": config.passes, "tokens_a_step": config.tokens_per_step, "steps": config.steps},
        "rank": {"stage": plan.rank, "layers": dict(plan.layers), "parameters": plan.state.parameters},
        "bytes_a_device": {
            "masters": plan.state.masters,
            "working_weights": plan.state.working_weights,
            "gathered_weights": plan.state.gathered_weights,
            "gradients": plan.state.gradients,
            "moments": plan.state.moments,
            "average": plan.state.average,
            "activations_kept": plan.activations.kept,
            "activations_kept_a_layer": plan.activations.kept_per_layer,
            "activations_recomputed": plan.activations.recomputed,
            "loss": plan.activations.loss,
            "reserved": RESERVED,
            "total": plan.memory,
            "spare": plan.spare,
        },
        "fits": plan.fits,
        "traffic_bytes_a_step": [dataclasses.asdict(flow) for flow in plan.flows],
        "flops": {"model_a_step": plan.model_flops, "recomputed_share": plan.recomputed},
        "seconds_a_step": {"bound": dataclasses.asdict(plan.bound), "best_kernels": dataclasses.asdict(plan.expected)},
        "run_time": times,
    }
