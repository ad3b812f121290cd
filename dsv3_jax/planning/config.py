"""What a plan is asked for: model, cluster, mesh, and how the run is trained."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import ConfigError
from dsv3_jax.pipeline.slots import moe_layers_of_stages
from dsv3_jax.planning.hardware import Target
from dsv3_jax.planning.precision_bytes import Formats, formats_of, width_of
from dsv3_jax.sharding.mesh import MeshConfig

PipelineSchedule = Literal["dualpipe", "zb1p", "1f1b"]
Average = Literal["host", "device", "none"]
Rematerialisation = Literal["none", "report", "products", "full"]
PlanLayout = Literal["step", "report"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """One run on one cluster.

    Attributes:
      model: the architecture.
      target: the cluster.
      mesh: sizes of the axes; their product is the number of devices.
      sequence_length: T.
      batch_size: sequences a step over the whole cluster; 0: one micro-batch a rank that carries batch, with a
        pipeline as many as keep it busy.
      micro_batch_size: sequences a forward pass on each rank.
      precision: float32, bfloat16 or fp8 (section 3.3).
      rematerialisation: policy of `dsv3_jax.modules.rematerialisation`.
      gradient_dtype, master_dtype: of accumulated gradients and of the weights the optimizer moves.
      moment_dtype: of both of Adam's moments; "recipe" is what the precision names.
      zero: optimizer state is divided over the replicas of what it belongs to (ZeRO-1) beside FSDP.
      average: where the running average of the weights is kept (section 3.2.3: in the hosts' memory).
      schedule: of the pipeline, where there are stages.
      layout: of what the figures are. "step": this project's training step, which is also what --compile compiles.
        "report": with stages, the report's own run: masters divided over replicas beside a working copy, FP8 caches of
        what experts were sent, all of a stage's activations kept under the rematerialisation's policy.
      tokens: of the whole run, for its time and cost.
    """

    model: ModelConfig
    target: Target
    mesh: MeshConfig
    sequence_length: int = 4096
    batch_size: int = 0
    micro_batch_size: int = 1
    precision: str = "bfloat16"
    rematerialisation: Rematerialisation = "report"
    gradient_dtype: str = "float32"
    master_dtype: str = "float32"
    moment_dtype: str = "recipe"
    zero: bool = True
    average: Average = "host"
    schedule: PipelineSchedule = "dualpipe"
    layout: PlanLayout = "step"
    tokens: float = 14.8e12

    def __post_init__(self) -> None:
        for name in ("sequence_length", "micro_batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.sequence_length > self.model.max_position_embeddings:
            raise ConfigError(
                f"sequence_length ({self.sequence_length}) must not exceed the model's max_position_embeddings "
                f"({self.model.max_position_embeddings})"
            )
        for name, kind in (
            ("schedule", PipelineSchedule),
            ("average", Average),
            ("rematerialisation", Rematerialisation),
            ("layout", PlanLayout),
        ):
            if getattr(self, name) not in get_args(kind):
                raise ConfigError(f"{name} must be one of {', '.join(get_args(kind))}, not '{getattr(self, name)}'")
        if not self.tokens > 0:
            raise ConfigError(f"tokens must be positive, not {self.tokens}")
        formats_of(self.precision)
        for name in ("gradient_dtype", "master_dtype"):
            width_of(getattr(self, name))
        if self.batch_size < 0:
            raise ConfigError(f"batch_size must not be negative, not {self.batch_size}")
        object.__setattr__(self, "mesh", self.mesh.resolve(self.target.devices))
        if not self.batch_size:
            object.__setattr__(self, "batch_size", self.batch_ranks * self.micro_batch_size * self._least_passes)
        self.mesh.check(self.model, self.batch_size)
        if self.batch_size % (self.batch_ranks * self.micro_batch_size):
            raise ConfigError(
                f"batch_size ({self.batch_size}) must be a multiple of {self.batch_ranks * self.micro_batch_size}: "
                f"micro_batch_size ({self.micro_batch_size}) x the {self.batch_ranks} ranks of data, fsdp and expert"
            )
        self._check_stages()

    def _check_stages(self) -> None:
        stages = self.mesh.stage
        if stages == 1 and self.layout == "report":
            raise ConfigError("layout report is of a pipeline: give mesh a stage axis, such as stage=16, or use step")
        if self.has_pipelined_step:
            moe_layers_of_stages(self.model, stages)  # says where there are too many stages
            if self.schedule == "zb1p" and self.passes < stages:
                raise ConfigError(
                    f"zb1p wants at least as many micro-batches as stages ({stages}), not {self.passes}; batch_size "
                    f"{stages * self.batch_ranks * self.micro_batch_size} would do"
                )
        if stages > 1 and self.schedule == "dualpipe" and (stages % 2 or self.passes % 2 or self.passes < 2 * stages):
            raise ConfigError(
                f"dualpipe wants an even stage ({stages}) and an even number of micro-batches of at least "
                f"{2 * stages}, not {self.passes}; batch_size "
                f"{2 * stages * self.batch_ranks * self.micro_batch_size} would do"
            )

    @property
    def _least_passes(self) -> int:
        stages = self.mesh.stage
        return 1 if stages == 1 else 4 * stages

    @property
    def is_training_step(self) -> bool:
        """Whether the figures are of this project's training step.

        It replicates masters over data and expert ranks, of which only the moments are divided, and computes experts
        anew in the backward pass.
        """
        return self.layout == "step"

    @property
    def has_pipelined_step(self) -> bool:
        """Whether they are of the step with stages: `pipeline.passes`."""
        return self.is_training_step and self.mesh.stage > 1

    @property
    def spreads_experts(self) -> bool:
        """Whether the step's experts take their tokens from other devices, in pieces that keep nothing."""
        return self.is_training_step and self.target.devices > 1

    @property
    def formats(self) -> Formats:
        return formats_of(self.precision)

    @property
    def moment_width(self) -> float:
        """Bytes of each of Adam's moments."""
        return self.formats.moment if self.moment_dtype == "recipe" else width_of(self.moment_dtype)

    @property
    def batch_ranks(self) -> int:
        """Ranks with tokens of their own: the expert axis carries batch too."""
        return self.mesh.data * self.mesh.fsdp * self.mesh.expert

    @property
    def passes(self) -> int:
        """Micro-batches of a step on one rank."""
        return self.batch_size // (self.batch_ranks * self.micro_batch_size)

    @property
    def tokens_a_pass(self) -> int:
        """Tokens of one micro-batch on one rank."""
        return self.micro_batch_size * self.sequence_length

    @property
    def tokens_a_step(self) -> int:
        """Over the whole cluster."""
        return self.batch_size * self.sequence_length

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return math.ceil(self.tokens / self.tokens_a_step)
