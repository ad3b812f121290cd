"""The configuration of a run: model, data, training, precision and mesh, checked together."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

from dsv3_jax.bounds import LARGEST_COUNT, LARGEST_SEED, check_bounds
from dsv3_jax.config import ModelConfig
from dsv3_jax.data import DataConfig
from dsv3_jax.errors import ConfigError
from dsv3_jax.modules.attention_core import AttentionChoice
from dsv3_jax.modules.rematerialisation import REMATERIALISATIONS, Rematerialisation
from dsv3_jax.operating_system import Notice
from dsv3_jax.pipeline.schedules import ScheduleName
from dsv3_jax.precision import Precision
from dsv3_jax.sharding.mesh import MeshConfig
from dsv3_jax.training.schedules import TrainingSchedule, tokens_of_run

Balance = Literal["sequence", "batch", "none"]
Optimizer = Literal["adamw", "muon"]
TrackerName = Literal["tensorboard", "wandb", "trackio", "none"]

_BOUNDS = {
    "steps": (1, 10**7),
    "batch_size": (1, LARGEST_COUNT),
    "micro_batch_size": (0, LARGEST_COUNT),
    "seed": (0, LARGEST_SEED),
    "beta1": (0.0, 1.0),
    "beta2": (0.0, 1.0),
    "epsilon": (0.0, 1.0),
    "weight_decay": (0.0, 1e3),
    "muon_momentum": (0.0, 1.0),
    "qk_clip": (0.0, 1e9),
    "gradient_clip": (0.0, 1e30),
    "ema_decay": (0.0, 1.0),
    "loss_chunk": (1, LARGEST_COUNT),
    "log_every": (0, LARGEST_COUNT),
    "evaluate_every": (0, LARGEST_COUNT),
    "checkpoint_every": (0, LARGEST_COUNT),
    "keep_checkpoints": (1, LARGEST_COUNT),
    "max_nonfinite_steps": (1, LARGEST_COUNT),
    "sample_tokens": (0, 2**24),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a model is trained (report section 4.2).

    Attributes:
      steps: number of optimizer steps of the run.
      batch_size: sequences per step, after the batch size has stopped growing.
      micro_batch_size: sequences per forward pass; a step adds up the gradients of its passes in float32. 0 for the
        whole batch in one pass.
      seed: random seed of the initial weights.
      schedule: learning rate, batch size, gamma, alpha and lambda over the run.
      balance: auxiliary balance loss, computed within each sequence (as the report), over the sequences of each forward
        pass ("batch"; over the whole batch only if that is one pass), or not at all.
      optimizer: adamw, or muon, which orthogonalises the momentum of the hidden matrices and leaves embedding, output
        head and norms to AdamW; both take the same learning rate.
      beta1: decay of AdamW's first moment, per step.
      beta2: decay of AdamW's second moment, per step.
      epsilon: AdamW's epsilon. (The report gives none.)
      weight_decay: weight decay of either optimizer; the gains of norms are not decayed.
      muon_momentum: Muon's momentum, per step.
      qk_clip: largest attention logit of a head (Kimi K2 took 100): after a step with a larger one, the head's queries
        and keys are scaled down; 0 for no clipping.
      gradient_clip: largest global norm of the gradient; a larger gradient is scaled down to it.
      moment_dtype: dtype of the optimizer's moments: "float32", "bfloat16" (report section 3.3.3), or "recipe", which
        is bfloat16 with FP8 precision and float32 otherwise.
      ema_decay: decay per step of the running average of the weights, which evaluation and loading a checkpoint
        use; 0 for no average. (The report gives no value.)
      rematerialisation: what to recompute in the backward pass: none, report, products or full. More recomputation
        takes less memory and more time.
      attention: what computes attention: auto (a kernel where the device has one), scan (plain products, tile by
        tile), or cudnn (on an NVIDIA GPU, in bfloat16, with data.isolate_documents false; elsewhere as auto).
      loss_chunk: number of tokens whose logits a device holds at a time.
      overlap_exchange: with a mesh.expert axis, send a piece of each pass's tokens to their experts while the piece
        before it is multiplied (report section 3.2.1).
      pipeline_schedule: order of the micro-batches (of micro_batch_size sequences) with mesh.stage above 1: "dualpipe",
        or "zb1p" or "1f1b" (report section 3.2.1).
      zero: on a mesh, shard the optimizer state over the replicas of its parameters (ZeRO-1).
      log_every: print a line every so many steps, or never with 0. (A terminal shows a progress bar instead.)
      evaluate_every: evaluate on the validation set every so many steps; 0 for only at the start and the end.
      checkpoint_every: save a checkpoint every so many steps; 0 for only at the end.
      keep_checkpoints: number of newest checkpoints to keep; older ones are deleted.
      max_nonfinite_steps: stop after this many steps in a row whose loss or gradient is infinite or NaN.
      tracker: where the numbers of each step are recorded beside metrics.jsonl: tensorboard (files in the run's
        folder), wandb, trackio or none.
      stop_signal: what a cluster sends before the end of a job: USR1, USR2 or none. The signal saves a checkpoint and
        ends the run, as SIGINT (Ctrl-C) and SIGTERM do; the others of these are ignored.
      sample_tokens: number of tokens of sample text to generate at the end; 0 for none.
    """

    steps: int = 300
    batch_size: int = 8
    micro_batch_size: int = 0
    seed: int = 0
    schedule: TrainingSchedule = dataclasses.field(default_factory=TrainingSchedule)
    balance: Balance = "sequence"
    optimizer: Optimizer = "adamw"
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    muon_momentum: float = 0.95
    qk_clip: float = 0.0
    gradient_clip: float = 1.0
    moment_dtype: Literal["recipe", "float32", "bfloat16"] = "recipe"
    ema_decay: float = 0.99
    rematerialisation: Rematerialisation = "none"
    attention: AttentionChoice = "auto"
    loss_chunk: int = 8192
    overlap_exchange: bool = False
    pipeline_schedule: ScheduleName = "dualpipe"
    zero: bool = True
    log_every: int = 10
    evaluate_every: int = 0
    checkpoint_every: int = 100
    keep_checkpoints: int = 3
    max_nonfinite_steps: int = 5
    tracker: TrackerName = "tensorboard"
    stop_signal: Notice = "USR1"
    sample_tokens: int = 128

    def __post_init__(self) -> None:
        check_bounds(self, _BOUNDS, "training.")
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ConfigError(
                f"training.micro_batch_size ({self.micro_batch_size}) must divide training.batch_size "
                f"({self.batch_size})"
            )
        if self.balance not in get_args(Balance):
            raise ConfigError(f"training.balance must be one of {', '.join(get_args(Balance))}, not {self.balance!r}")
        if self.moment_dtype not in ("recipe", "float32", "bfloat16"):
            raise ConfigError(f"training.moment_dtype must be recipe, float32 or bfloat16, not {self.moment_dtype!r}")
        choices = {"optimizer": Optimizer, "stop_signal": Notice, "tracker": TrackerName, "attention": AttentionChoice}
        for name, kind in choices.items():
            if getattr(self, name) not in get_args(kind):
                raise ConfigError(
                    f"training.{name} must be one of {', '.join(get_args(kind))}, not {getattr(self, name)!r}"
                )
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
        for name in ("beta1", "beta2", "muon_momentum", "ema_decay"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"training.{name} must be at least 0 and below 1, not {getattr(self, name)}")
        for name in ("epsilon", "gradient_clip"):
            if not getattr(self, name) > 0.0:
                raise ConfigError(f"training.{name} must be positive, not {getattr(self, name)}")

    def evaluates_after(self, step: int) -> bool:
        """Returns whether a run evaluates on the validation set after `step` steps."""
        due = bool(self.evaluate_every) and step % self.evaluate_every == 0
        return due or step in (0, self.steps)

    @property
    def rows_per_pass(self) -> int:
        """Number of sequences of one forward pass over all devices."""
        return self.micro_batch_size or self.batch_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters, which are trained instead of the weights.

    Attributes:
      rank: columns of B and rows of A; 0 trains the weights themselves.
      alpha: the product B A is multiplied by alpha / rank.
      targets: the matrices that have adapters: attention, all, or published names joined by commas, such as
        kv_b_proj,o_proj,gate_proj,up_proj,down_proj (gate_proj and up_proj only together).
      experts: whether the routed experts' matrices among the targets have adapters too, each expert its own.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: str = "attention"
    experts: bool = False

    def __post_init__(self) -> None:
        check_bounds(self, {"rank": (0, 2**16), "alpha": (0.0, 1e6)}, "lora.")
        if ("gate_proj" in self.targets) != ("up_proj" in self.targets):
            raise ConfigError("lora.targets must name gate_proj and up_proj together, which are one parameter")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """A teacher, whose distribution of the next token is learned beside the tokens themselves.

    Attributes:
      run: folder of a run or of a published checkpoint with the tokenizer of this run; empty for no teacher.
      step: step of the run's checkpoint; 0 for the newest.
      top_k: how many of the teacher's most likely tokens are told apart, all others being one outcome; 0 for all.
      weight: weight of the teacher's distribution in the main loss; that of the tokens is 1 minus it.
    """

    run: str = ""
    step: int = 0
    top_k: int = 64
    weight: float = 0.5

    def __post_init__(self) -> None:
        check_bounds(self, {"step": (0, 10**18), "top_k": (0, LARGEST_COUNT), "weight": (0.0, 1.0)}, "teacher.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The configuration of a run. Its JSON form is in the run's folder and inside every checkpoint.

    Attributes:
      preset: name of the preset whose defaults the run started from.
      model: the architecture.
      data: the corpus, the tokenizer and how rows are made.
      training: the optimizer, the schedules and what is logged and saved.
      precision: name of the precision recipe (`Precision.preset`); "auto" until the run starts.
      mesh: number of devices along each mesh axis, by default all along fsdp. It may change when a run is resumed.
      lora: low-rank adapters; of rank 0, and so none, by default.
      teacher: a model to distil; by default none.
    """

    preset: str
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    precision: str = "auto"
    mesh: MeshConfig = dataclasses.field(default_factory=lambda: MeshConfig(fsdp=-1))
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    teacher: TeacherConfig = dataclasses.field(default_factory=TeacherConfig)

    def __post_init__(self) -> None:
        if self.lora.rank and self.training.ema_decay:
            raise ConfigError("training.ema_decay must be 0 with lora.rank above 0: adapters have no running average")
        if self.training.attention == "cudnn" and self.data.isolate_documents:
            raise ConfigError(
                "training.attention 'cudnn' does not keep documents apart: choose 'auto', or set "
                "data.isolate_documents to false"
            )
        if self.lora.rank and (self.training.optimizer != "adamw" or self.training.qk_clip):
            raise ConfigError("lora.rank above 0 needs training.optimizer adamw and training.qk_clip 0")
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
        """Returns the number that the sequences of a step are a multiple of while the batch grows.

        Args:
          batch_ranks: number of parts that the mesh splits a batch into.
        """
        return self.training.rows_per_pass if self.training.micro_batch_size else batch_ranks

    def total_tokens(self, batch_ranks: int = 1) -> int:
        """Returns the number of tokens of the whole run.

        Args:
          batch_ranks: number of parts that the mesh splits a batch into.
        """
        training = self.training
        multiple = self.batch_multiple(batch_ranks)
        return tokens_of_run(
            training.schedule, training.steps, training.batch_size, self.data.sequence_length, multiple
        )

    @property
    def moment_dtype(self) -> str:
        """Dtype of the moments: `training.moment_dtype`, or the precision recipe's where that says "recipe"."""
        chosen = self.training.moment_dtype
        return Precision.preset(self.precision).moment_dtype if chosen == "recipe" else chosen

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as nested dictionaries of plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunConfig:
        """Makes a configuration from what `to_dict` returns.

        Raises:
          ConfigError: a field is missing, unknown or wrong.
        """
        try:
            training = dict(values["training"])
            training["schedule"] = TrainingSchedule(**training["schedule"])
            return cls(
                preset=values["preset"],
                model=ModelConfig.from_dict(values["model"]),
                data=DataConfig(**values["data"]),
                training=TrainingConfig(**training),
                precision=values["precision"],
                **({"mesh": MeshConfig(**values["mesh"])} if "mesh" in values else {}),
                lora=LoraConfig(**values.get("lora", {})),
                teacher=TeacherConfig(**values.get("teacher", {})),
            )
        except (KeyError, TypeError) as error:
            raise ConfigError(f"the run's configuration cannot be read: {error}") from error
