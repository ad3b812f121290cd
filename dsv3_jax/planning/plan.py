"""A plan on paper: what every device holds, sends and computes, from the configuration alone, in milliseconds."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

from dsv3_jax.counts import count_flops
from dsv3_jax.planning.activations import ActivationMemory, activation_memory
from dsv3_jax.planning.config import PlanConfig
from dsv3_jax.planning.layers import LayerKind, rank_layers
from dsv3_jax.planning.operations import operations
from dsv3_jax.planning.stage_step import stage_activation_memory, stage_rank_layers, stage_state_memory
from dsv3_jax.planning.stage_traffic import stage_traffic
from dsv3_jax.planning.state_memory import StateMemory, state_memory
from dsv3_jax.planning.step_time import StepTime, step_time
from dsv3_jax.planning.traffic import Traffic, traffic

RESERVED = 2 * 2**30
"""Bytes that the runtime, its communication buffers and fragmentation take (0.8 to 2 GB in arXiv 2502.07846)."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """One run on one cluster, seen from the rank of the stage axis that holds most.

    Attributes:
      config: what was asked.
      rank: that rank of the stage axis; in the training step, where all hold the same, the one that computes and sends
        most.
      layers: what it holds.
      state, activations: bytes on each of its devices.
      flows: what it sends in a step.
      bound: time of a step at the hardware's peaks.   expected: at what the best kernels reach.
      recomputed: operations made twice, as a share of all.
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
        """Bytes a device needs."""
        return self.state.on_device + self.activations.total + RESERVED

    @property
    def spare(self) -> float:
        """Bytes a device has left; negative where the plan does not fit."""
        return self.config.target.accelerator.memory - self.memory

    @property
    def fits(self) -> bool:
        return self.spare >= 0

    @property
    def model_flops(self) -> float:
        """Operations of a step over the whole cluster as MFU counts them: causal, no recomputation, no MTP."""
        config = self.config
        return count_flops(config.model, config.sequence_length).training * config.tokens_a_step

    def mfu(self, seconds: float) -> float:
        """Model FLOPs utilisation of a step that takes so long, over the bfloat16 peak (as the report's 39% is)."""
        target = self.config.target
        return self.model_flops / (seconds * target.devices * target.accelerator.flops)

    def device_hours(self, seconds: float) -> float:
        """Of the whole run, if a step takes so long."""
        config = self.config
        return config.tokens / config.tokens_a_step * seconds * config.target.devices / 3600

    def days(self, seconds: float) -> float:
        """Of the whole run, if a step takes so long."""
        return self.device_hours(seconds) / self.config.target.devices / 24


def make_plan(config: PlanConfig) -> Plan:
    """The plan of a configuration that passed its checks."""
    if config.has_pipelined_step:
        return _pipelined_plan(config)
    dualpipe = config.mesh.stage > 1 and config.schedule == "dualpipe"
    copies = 2 if dualpipe else 1
    ranks = rank_layers(config.model, config.mesh.stage, dualpipe=dualpipe)
    memories = [(state_memory(config, layers, copies=copies), activation_memory(config, layers)) for layers in ranks]
    worst = max(range(len(ranks)), key=lambda rank: memories[rank][0].on_device + memories[rank][1].total)
    layers = ranks[worst]
    state, activations = memories[worst]
    flows = traffic(config, layers, copies=copies)
    return _timed(config, worst, layers, state, activations, flows, copies)


def _pipelined_plan(config: PlanConfig) -> Plan:
    """Of the training step with stages, all of whose ranks hold the same."""
    rank, flows = stage_traffic(config)
    state, activations = stage_state_memory(config), stage_activation_memory(config)
    return _timed(config, rank, stage_rank_layers(config), state, activations, flows, copies=1)


def _timed(
    config: PlanConfig,
    rank: int,
    layers: Counter[LayerKind],
    state: StateMemory,
    activations: ActivationMemory,
    flows: list[Traffic],
    copies: int,
) -> Plan:
    times = [step_time(config, layers, state, flows, peaks=peaks, copies=copies) for peaks in (True, False)]
    once = operations(config, once=True).total
    return Plan(
        config=config,
        rank=rank,
        layers=layers,
        state=state,
        activations=activations,
        flows=flows,
        bound=times[0],
        expected=times[1],
        recomputed=operations(config).total / once - 1,
    )


def plan_as_dict(plan: Plan) -> dict[str, Any]:
    """For programs: every figure of the plan with its unit in its name."""
    from dsv3_jax.planning.published import like_the_report

    config, times = plan.config, {}
    seconds = {"bound": plan.bound.total, "best_kernels": plan.expected.total}
    seconds["at_the_reports_pace"] = like_the_report(plan)
    for name, value in seconds.items():
        times[name] = {
            "step_seconds": value,
            "mfu": plan.mfu(value),
            "tokens_per_second_per_device": config.tokens_a_step / value / config.target.devices,
            "days": plan.days(value),
            "device_hours": plan.device_hours(value),
        }
    return {
        "model": config.model.to_dict(),
        "target": {
            "name": config.target.accelerator.name,
            "devices": config.target.devices,
            "topology": list(config.target.topology),
            "memory_bytes": config.target.accelerator.memory,
        },
        "mesh": dataclasses.asdict(config.mesh),
        "run": {
            field.name: getattr(config, field.name)
            for field in dataclasses.fields(config)
            if field.name not in ("model", "target", "mesh")
        }
        | {"passes": config.passes, "tokens_a_step": config.tokens_a_step, "steps": config.steps},
        "rank": {"stage": plan.rank, "layers": dict(plan.layers), "parameters": plan.state.parameters},
        "bytes_a_device": {
            "masters": plan.state.masters,
            "working_weights": plan.state.working_weights,
            "gathered_weights": plan.state.gathered_weights,
            "gradients": plan.state.gradients,
            "moments": plan.state.moments,
            "average": plan.state.average,
            "activations_kept": plan.activations.kept,
            "activations_kept_a_layer": plan.activations.kept_a_layer,
            "activations_recomputed": plan.activations.recomputed,
            "loss": plan.activations.loss,
            "reserved": RESERVED,
            "total": plan.memory,
            "spare": plan.spare,
            "host_average": plan.state.host_average,
        },
        "fits": plan.fits,
        "traffic_bytes_a_step": [dataclasses.asdict(flow) for flow in plan.flows],
        "flops": {"model_a_step": plan.model_flops, "recomputed_share": plan.recomputed},
        "seconds_a_step": {"bound": dataclasses.asdict(plan.bound), "best_kernels": dataclasses.asdict(plan.expected)},
        "run_time": times,
    }
