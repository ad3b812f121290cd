"""Everything a run is: the model, the data, the training and its numbers, checked together."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

from dsv3_jax.config import ModelConfig
from dsv3_jax.data import DataConfig
from dsv3_jax.errors import ConfigError
from dsv3_jax.modules.rematerialisation import REMATERIALISATIONS
from dsv3_jax.pipeline.schedules import ScheduleName
from dsv3_jax.precision import Precision
from dsv3_jax.sharding.mesh import MeshConfig
from dsv3_jax.training.schedules import Schedule, tokens_of_run

Balance = Literal["sequence", "batch", "none"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a model is trained (report section 4.2).

    Attributes:
      steps: optimizer steps of the run.
      batch_size: sequences a step, once the ramp is over.
      micro_batch_size: sequences a forward pass; 0 for the whole batch. Gradients are added up in float32.
      seed: of the initial weights.
      schedule: learning rate, batch ramp, gamma, alpha and lambda over the run.
      balance: the auxiliary balance loss: within each sequence (the report's), over the batch, or none.
      beta1, beta2, epsilon, weight_decay: AdamW; norm gains are not decayed. (The report gives no epsilon.)
      gradient_clip: largest global norm of the gradient.
      moment_dtype: of both of AdamW's moments: "float32", "bfloat16" (report section 3.3.3), or "recipe": the one that
        the precision recipe names, bfloat16 beside FP8 products and float32 otherwise.
      ema_decay: of the running average of the weights; 0 for none. (The report gives no value.)
      rematerialisation: name of a policy of `dsv3_jax.modules.rematerialisation`.
      loss_chunk: tokens whose logits a device holds at a time.
      overlap_exchange: on a mesh with an expert axis, a pass goes through the experts in two halves, so that one can
        travel while the other is computed (section 3.2.1).
      pipeline_schedule: of the stages of a mesh: "dualpipe", "zb1p" or "1f1b" (section 3.2.1); passes are its
        micro-batches.
      zero: on a mesh, optimizer state is divided over the replicas of its parameters (ZeRO-1).
      log_every, evaluate_every, checkpoint_every: steps; 0 for only at the ends.
      keep_checkpoints: how many are kept.
      max_nonfinite_steps: stop after so many steps in a row with a loss or gradient that is not finite.
      sample_tokens: length of the text sampled at the end; 0 for none.
    """

    steps: int = 300
    batch_size: int = 8
    micro_batch_size: int = 0
    seed: int = 0
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    balance: Balance = "sequence"
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    gradient_clip: float = 1.0
    moment_dtype: Literal["recipe", "float32", "bfloat16"] = "recipe"
    ema_decay: float = 0.99
    rematerialisation: str = "none"
    loss_chunk: int = 8192
    overlap_exchange: bool = False
    pipeline_schedule: ScheduleName = "dualpipe"
    zero: bool = True
    log_every: int = 10
    evaluate_every: int = 0
    checkpoint_every: int = 100
    keep_checkpoints: int = 3
    max_nonfinite_steps: int = 5
    sample_tokens: int = 128

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "loss_chunk", "keep_checkpoints", "max_nonfinite_steps"):
            _at_least(f"training.{name}", getattr(self, name), 1)
        for name in ("micro_batch_size", "log_every", "evaluate_every", "checkpoint_every", "sample_tokens"):
            _at_least(f"training.{name}", getattr(self, name), 0)
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ConfigError(
                f"training.micro_batch_size ({self.micro_batch_size}) must divide training.batch_size "
                f"({self.batch_size})"
            )
        if self.balance not in get_args(Balance):
            raise ConfigError(f"training.balance must be one of {', '.join(get_args(Balance))}, not {self.balance!r}")
        if self.moment_dtype not in ("recipe", "float32", "bfloat16"):
            raise ConfigError(f"training.moment_dtype must be recipe, float32 or bfloat16, not {self.moment_dtype!r}")
        if self.rematerialisation not in REMATERIALISATIONS:
            raise ConfigError(
                f"training.rematerialisation must be one of {', '.join(REMATERIALISATIONS)}, "
                f"not {self.rematerialisation!r}"
            )
        if self.pipeline_schedule not in get_args(ScheduleName):
            raise ConfigError(
                f"training.pipeline_schedule must be one of {', '.join(get_args(ScheduleName))}, "
                f"not {self.pipeline_schedule!r}"
            )
        for name in ("beta1", "beta2", "ema_decay"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"training.{name} must lie between 0 and 1, not {getattr(self, name)}")
        for name in ("epsilon", "gradient_clip"):
            if not getattr(self, name) > 0.0:
                raise ConfigError(f"training.{name} must be positive, not {getattr(self, name)}")
        if not self.weight_decay >= 0.0:
            raise ConfigError(f"training.weight_decay must not be negative, not {self.weight_decay}")

    @property
    def rows_per_pass(self) -> int:
        """Sequences of one forward pass."""
        return self.micro_batch_size or self.batch_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run. Its JSON form lies beside the results and inside every checkpoint.

    Attributes:
      mesh: of the devices, which may be others when a run goes on; parameters and batch are divided over all of them
        unless it says otherwise.
    """

    preset: str
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    precision: str = "auto"
    mesh: MeshConfig = dataclasses.field(default_factory=lambda: MeshConfig(fsdp=-1))

    def __post_init__(self) -> None:
        length = self.data.sequence_length
        if length > self.model.max_position_embeddings:
            raise ConfigError(
                f"data.sequence_length ({length}) must not exceed model.max_position_embeddings "
                f"({self.model.max_position_embeddings})"
            )
        if length <= self.model.num_nextn_predict_layers:
            raise ConfigError(
                f"data.sequence_length ({length}) must exceed model.num_nextn_predict_layers "
                f"({self.model.num_nextn_predict_layers})"
            )
        if self.data.tokenizer == "train" and self.data.vocab_size > self.model.vocab_size:
            raise ConfigError(
                f"data.vocab_size ({self.data.vocab_size}) must not exceed model.vocab_size ({self.model.vocab_size})"
            )

    def batch_multiple(self, batch_ranks: int = 1) -> int:
        """What the sequences of a step are a multiple of while the batch grows, with so many parts of a batch."""
        return self.training.rows_per_pass if self.training.micro_batch_size else batch_ranks

    def total_tokens(self, batch_ranks: int = 1) -> int:
        """Tokens the run sees, with so many parts of a batch."""
        training = self.training
        multiple = self.batch_multiple(batch_ranks)
        return tokens_of_run(
            training.schedule, training.steps, training.batch_size, self.data.sequence_length, multiple
        )

    @property
    def moment_dtype(self) -> str:
        """Of AdamW's moments: the training configuration's, or that of the precision recipe."""
        chosen = self.training.moment_dtype
        return Precision.preset(self.precision).moment_dtype if chosen == "recipe" else chosen

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunConfig:
        """The inverse of `to_dict`."""
        try:
            training = dict(values["training"])
            training["schedule"] = Schedule(**training["schedule"])
            return cls(
                preset=values["preset"],
                model=ModelConfig.from_dict(values["model"]),
                data=DataConfig(**values["data"]),
                training=TrainingConfig(**training),
                precision=values["precision"],
                **({"mesh": MeshConfig(**values["mesh"])} if "mesh" in values else {}),
            )
        except (KeyError, TypeError) as error:
            raise ConfigError(f"the run's configuration cannot be read: {error}") from error


def _at_least(name: str, value: Any, smallest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
        raise ConfigError(f"{name} must be a whole number of at least {smallest}, not {value!r}")
