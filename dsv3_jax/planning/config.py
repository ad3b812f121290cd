"""Describes what a plan is made for: a training run on a cluster."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal, get_args

from dsv3_jax.config import ModelConfig
from dsv3_jax.data import DataConfig
from dsv3_jax.errors import ConfigError
from dsv3_jax.modules.attention_core import AttentionChoice
from dsv3_jax.modules.rematerialisation import Rematerialisation
from dsv3_jax.pipeline.schedules import ScheduleName
from dsv3_jax.pipeline.slots import moe_layers_of_stages
from dsv3_jax.planning.hardware import Accelerator, Target
from dsv3_jax.precision import Precision
from dsv3_jax.sharding.mesh import MeshConfig
from dsv3_jax.training.config import Optimizer, RunConfig, TrainingConfig
from dsv3_jax.training.defaults import default_run

Average = Literal["device", "none"]
MomentDtype = Literal["recipe", "float32", "bfloat16"]

FEWEST_TOKENS = 4096
"""The fewest tokens of a sequence that advice and search leave on a rank of the context axis."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """One training run on one cluster.

    Attributes:
      model: the architecture.
      target: the cluster.
      mesh: sizes of the mesh axes; their product is the number of devices.
      sequence_length: tokens per sequence.
      batch_size: sequences per step over the whole cluster; 0 for the fewest that keep the mesh busy: one micro-batch
        per rank, or with a pipeline four per stage.
      micro_batch_size: sequences per forward pass on each rank of the batch axes; 0 for all of a rank's sequences.
      precision: a recipe as in `dsv3_jax.precision.Precision.preset`; "auto" is float32 on CPUs and bfloat16 elsewhere.
      rematerialisation: a policy of `dsv3_jax.modules.rematerialisation`.
      attention: what computes attention, as in `dsv3_jax.modules.attention_core`.
      optimizer: "adamw" or "muon", which has one moment of every hidden matrix where AdamW has two.
      moment_dtype: dtype of the optimizer's moments; "recipe" is the one that the precision recipe names.
      zero: whether optimizer state is sharded over the replicas of its parameters (ZeRO-1).
      average: "device" if a running average of the weights is kept, else "none".
      schedule: the pipeline schedule, where the mesh has stages.
      tokens: tokens of the whole run, for its time and cost.

    Raises:
      ConfigError: a value is impossible, or the mesh does not divide the devices, the model or the batch.
    """

    model: ModelConfig
    target: Target
    mesh: MeshConfig
    sequence_length: int = 4096
    batch_size: int = 0
    micro_batch_size: int = 1
    precision: str = "auto"
    rematerialisation: Rematerialisation = "report"
    attention: AttentionChoice = "auto"
    optimizer: Optimizer = "adamw"
    moment_dtype: MomentDtype = "recipe"
    zero: bool = True
    average: Average = "device"
    schedule: ScheduleName = "dualpipe"
    tokens: float = 14.8e12

    def __post_init__(self) -> None:
        if self.precision == "auto":
            recipe = "float32" if self.target.accelerator.platform == "cpu" else "bfloat16"
            object.__setattr__(self, "precision", recipe)
        for name, smallest in (("sequence_length", 1), ("batch_size", 0), ("micro_batch_size", 0)):
            if getattr(self, name) < smallest:
                raise ConfigError(f"{name} must be at least {smallest}, not {getattr(self, name)}")
        if self.average not in get_args(Average):
            raise ConfigError(f"average must be one of {', '.join(get_args(Average))}, not '{self.average}'")
        if not self.tokens > 0:
            raise ConfigError(f"tokens must be positive, not {self.tokens}")
        object.__setattr__(self, "mesh", self.mesh.resolve(self.target.devices))
        if not self.batch_size:
            each = max(self.micro_batch_size, 1) * (1 if self.mesh.stage == 1 else 4 * self.mesh.stage)
            object.__setattr__(self, "batch_size", self.mesh.batch_ranks * each)
        self.mesh.check(self.model, self.batch_size, self.sequence_length)
        if not self.micro_batch_size:
            object.__setattr__(self, "micro_batch_size", self.batch_size // self.mesh.batch_ranks)
        if self.batch_size % self.sequences_per_pass:
            raise ConfigError(
                f"batch_size ({self.batch_size}) must be a multiple of {self.sequences_per_pass}: micro_batch_size "
                f"({self.micro_batch_size}) x the {self.mesh.batch_ranks} ranks of data, fsdp and expert"
            )
        _ = self.run, self.recipe  # each checks its own values
        if self.mesh.stage > 1:
            self._check_pipeline()

    def _check_pipeline(self) -> None:
        stages = self.mesh.stage
        moe_layers_of_stages(self.model, stages)  # refuses too many stages
        fewest = {"dualpipe": 2 * stages, "zb1p": stages, "1f1b": 1}[self.schedule]
        even = self.schedule == "dualpipe"
        if self.passes < fewest or (even and (stages % 2 or self.passes % 2)):
            wanted = f"an even stage ({stages}) and an even number of micro-batches of" if even else "micro-batches of"
            raise ConfigError(
                f"{self.schedule} needs {wanted} at least {fewest}, not {self.passes}; batch_size "
                f"{fewest * self.sequences_per_pass} would do"
            )

    @functools.cached_property
    def run(self) -> RunConfig:
        """The run that `dsv3 train` would make of this."""
        return RunConfig(
            preset="",
            model=self.model,
            data=DataConfig(sequence_length=self.sequence_length, vocab_size=self.model.vocab_size),
            training=TrainingConfig(
                batch_size=self.batch_size,
                micro_batch_size=self.sequences_per_pass,
                rematerialisation=self.rematerialisation,
                attention=self.attention,
                pipeline_schedule=self.schedule,
                zero=self.zero,
                overlap_exchange=self.mesh.expert > 1,
                optimizer=self.optimizer,
                moment_dtype=self.moment_dtype,
                ema_decay=TrainingConfig.ema_decay if self.average == "device" else 0.0,
            ),
            precision=self.precision,
            mesh=self.mesh,
        )

    @functools.cached_property
    def recipe(self) -> Precision:
        """The precision recipe."""
        return Precision.preset(self.precision)

    @property
    def has_stages(self) -> bool:
        """Whether the step is pipelined (`dsv3_jax.pipeline.passes`)."""
        return self.mesh.stage > 1

    @property
    def sequences_per_pass(self) -> int:
        """Sequences of one forward pass, over all ranks of the batch axes."""
        return self.mesh.batch_ranks * self.micro_batch_size

    @property
    def passes(self) -> int:
        """Micro-batches per step on one rank."""
        return self.batch_size // self.sequences_per_pass

    @property
    def tokens_per_pass(self) -> int:
        """Tokens of one micro-batch on one rank, outside of attention."""
        return self.micro_batch_size * self.sequence_length // self.mesh.context

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step over the whole cluster."""
        return self.batch_size * self.sequence_length

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return math.ceil(self.tokens / self.tokens_per_step)

    @property
    def hidden_bytes(self) -> int:
        """Bytes of the hidden states of one micro-batch on one rank."""
        return self.tokens_per_pass * self.model.hidden_size * self.recipe.dtype.itemsize

    @property
    def train_options(self) -> dict[str, str]:
        """Options and values with which `dsv3 train` makes this run; a flag has an empty value."""
        training = self.run.training
        return {
            "--precision": self.precision,
            **{f"--mesh.{axis}": str(size) for axis, size in self.mesh.sizes.items()},
            "--data.sequence-length": str(self.sequence_length),
            "--training.batch-size": str(training.batch_size),
            "--training.micro-batch-size": str(training.micro_batch_size),
            "--training.rematerialisation": training.rematerialisation,
            "--training.optimizer": training.optimizer,
            "--training.moment-dtype": training.moment_dtype,
            "--training.zero" if self.zero else "--training.no-zero": "",
            "--training.ema-decay": f"{training.ema_decay:g}",
            "--training.pipeline-schedule": training.pipeline_schedule,
            **({"--training.overlap-exchange": ""} if training.overlap_exchange else {}),
        }

    def to_json(self) -> dict[str, Any]:
        """Returns plain values, for the process that compiles the plan."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return values | {
            "model": self.model.to_dict(),
            "target": dataclasses.asdict(self.target),
            "mesh": dataclasses.asdict(self.mesh),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> PlanConfig:
        """Returns the configuration of which `to_json` made `values`."""
        target = values["target"]
        changed = {
            "model": ModelConfig.from_dict(values["model"]),
            "target": Target(Accelerator(**target["accelerator"]), target["devices"], tuple(target["topology"])),
            "mesh": MeshConfig(**values["mesh"]),
        }
        return cls(**values | changed)


def of_preset(preset: str, target: Target, mesh: MeshConfig, **given: Any) -> PlanConfig:
    """Returns the plan's configuration of the run that `dsv3 train` makes of a preset, with some values given.

    Where the preset's batch is not given and cannot be cut into micro-batches for this mesh, micro-batches become one
    sequence per rank; where it cannot be divided over the mesh at all, it becomes the smallest that can.

    Args:
      given: fields of PlanConfig; those that are None are the preset's (`dsv3_jax.training.defaults`).

    Raises:
      ConfigError: there is no such preset, or no plan of these values.
    """
    run = default_run(preset)
    training = run.training
    own: dict[str, Any] = {
        "sequence_length": run.data.sequence_length,
        "precision": run.precision,
        "rematerialisation": training.rematerialisation,
        "attention": training.attention,
        "optimizer": training.optimizer,
        "moment_dtype": training.moment_dtype,
        "zero": training.zero,
        "average": "device" if training.ema_decay else "none",
        "schedule": training.pipeline_schedule,
    }
    given = {name: value for name, value in given.items() if value is not None}
    fixed = own | given | {"model": run.model, "target": target, "mesh": mesh}
    ranks = mesh.resolve(target.devices).batch_ranks
    each = max(training.micro_batch_size // ranks, 1) if training.micro_batch_size else 0
    choices: list[dict[str, Any]] = [
        {"batch_size": training.batch_size, "micro_batch_size": each},
        {"batch_size": training.batch_size, "micro_batch_size": 1},
        {"batch_size": 0, "micro_batch_size": 1},
    ]
    for choice in choices[:-1]:
        try:
            return PlanConfig(**choice | fixed)
        except ConfigError:
            continue
    return PlanConfig(**choices[-1] | fixed)
