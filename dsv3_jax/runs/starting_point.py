"""The weights a new run starts from when it does not start from scratch."""

from __future__ import annotations

from pathlib import Path

from flax import nnx

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import UserError
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.runs.checkpoints import load_checkpoint, make_model
from dsv3_jax.runs.folder import RunFolder
from dsv3_jax.training.config import RunConfig


def architecture_of_source(source: Path) -> ModelConfig:
    """The architecture of a run's folder or of a checkpoint in the published layout.

    Raises:
      UserError: the folder is neither.
    """
    if RunFolder(source).checkpoints.is_dir():
        return RunFolder(source).read_config().model
    from dsv3_jax.interop import architecture_of

    return architecture_of(source)


def load_starting_point(source: Path, config: RunConfig) -> DeepSeekV3:
    """The model of a run's folder, or of a checkpoint in the published layout, for a run of `config`.

    Raises:
      UserError: the folder is neither, or its architecture is not the run's.
    """
    if RunFolder(source).checkpoints.is_dir():
        found, _, _ = load_checkpoint(source)
    else:
        from dsv3_jax.interop import load_hf

        found = load_hf(source, dtype="float32")  # masters
    ours, theirs = config.model.to_dict(), found.config.to_dict()
    different = sorted(name for name in ours if ours[name] != theirs[name])
    if different:
        name = different[0]
        raise UserError(
            f"{source} holds another architecture: {name} is {theirs[name]}, not {ours[name]}; "
            f"give --model.{name.replace('_', '-')} {theirs[name]}"
        )
    model = make_model(config)
    nnx.update(model, nnx.state(found))
    return model
