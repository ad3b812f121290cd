"""The weights that a new run starts from when they are not drawn at random."""

from __future__ import annotations

from pathlib import Path

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import UserError
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.modules.devices import Devices
from dsv3_jax.runs.checkpoints import load_checkpoint
from dsv3_jax.runs.folder import RunFolder
from dsv3_jax.training.config import RunConfig


def architecture_of_source(source: Path) -> ModelConfig:
    """Returns the architecture of a run's folder, or of a checkpoint in the published layout.

    Raises:
      UserError: the folder is neither.
    """
    if RunFolder(source).checkpoints.is_dir():
        return RunFolder(source).read_config().model
    from dsv3_jax.interop import architecture_of

    return architecture_of(source)


def load_starting_point(source: Path, config: RunConfig, devices: Devices) -> DeepSeekV3:
    """Returns the model of a run's folder, or of a checkpoint in the published layout, with float32 parameters.

    Args:
      config: the run that starts from the model.
      devices: where the parameters are kept; they are read straight to there.

    Raises:
      UserError: the folder is neither, or its architecture is not the run's.
    """
    _check_architecture(source, architecture_of_source(source), config)
    if RunFolder(source).checkpoints.is_dir():
        model = load_checkpoint(source, devices=devices)[0]
        _check_architecture(source, model.config, config)
        return model
    from dsv3_jax.interop import load_hf

    return load_hf(source, dtype="float32", devices=devices)


def _check_architecture(source: Path, found: ModelConfig, config: RunConfig) -> None:
    ours, theirs = config.model.to_dict(), found.to_dict()
    different = sorted(name for name in ours if ours[name] != theirs[name])
    if different:
        name = different[0]
        raise UserError(
            f"{source} holds another architecture: {name} is {theirs[name]}, not {ours[name]}; "
            f"give --model.{name.replace('_', '-')} {theirs[name]}"
        )
