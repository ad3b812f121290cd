"""The weights that a new run starts from when they are not drawn at random."""

from __future__ import annotations

import warnings
from pathlib import Path

from dsv3_jax.config import ModelConfig
from dsv3_jax.data import Tokenizer
from dsv3_jax.data.tokenizer import FILE_NAME as TOKENIZER_NAME
from dsv3_jax.data.tokenizer_training import byte_tokenizer
from dsv3_jax.errors import UserError
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.modules.devices import Devices
from dsv3_jax.runs.checkpoints import load_checkpoint
from dsv3_jax.runs.folder import RunFolder
from dsv3_jax.training.config import RunConfig

_OF_POSITIONS = ("max_position_embeddings", "rope_scaling")
"""The fields on which no weight depends: a run may extend the context of the model that it starts from."""


def architecture_of_source(source: Path) -> ModelConfig:
    """Returns the architecture of a run's folder, or of a checkpoint in the published layout.

    Raises:
      UserError: the folder is neither.
    """
    if RunFolder(source).checkpoints.is_dir():
        return RunFolder(source).read_config().model
    from dsv3_jax.interop import architecture_of

    return architecture_of(source)


def tokenizer_of_source(source: Path) -> Path:
    """Returns the folder of the tokenizer that belongs to the weights of a run or of a published checkpoint.

    Raises:
      UserError: a published checkpoint has no tokenizer.json.
    """
    if RunFolder(source).checkpoints.is_dir():
        return RunFolder(source).tokenizer.resolve()
    if not (source / TOKENIZER_NAME).exists():
        raise UserError(f"{source} has no {TOKENIZER_NAME}: give --data.tokenizer, the one that the weights belong to")
    return source.resolve()


def load_starting_point(source: Path, config: RunConfig, devices: Devices, *, step: int | None = None) -> DeepSeekV3:
    """Returns the model of a run's folder, or of a checkpoint in the published layout, with float32 parameters.

    Args:
      config: the run that starts from the model.
      devices: where the parameters are kept; they are read straight to there.
      step: the checkpoint of the run's folder; the newest if not given.

    Raises:
      UserError: the folder is neither, or its architecture is not the run's; the context alone may differ.
    """
    _check_architecture(source, architecture_of_source(source), config)
    if RunFolder(source).checkpoints.is_dir():
        model, tokenizer, _ = load_checkpoint(source, step=step, devices=devices)
        _check_architecture(source, model.config, config)
        compare_tokenizers(source, tokenizer, config)
        return model
    from dsv3_jax.interop import load_hf

    if (source / TOKENIZER_NAME).exists():
        compare_tokenizers(source, Tokenizer.load(source), config)
    return load_hf(source, dtype="float32", devices=devices)


def compare_tokenizers(source: Path, theirs: Tokenizer, config: RunConfig) -> None:
    """Warns where the run does not use the tokenizer of the weights."""
    named = config.data.tokenizer
    if named == "byte":
        same = theirs.fingerprint == Tokenizer(byte_tokenizer()).fingerprint
    else:
        same = named != "train" and Tokenizer.load(named).fingerprint == theirs.fingerprint
    if not same:
        warnings.warn(
            f"--data.tokenizer {named} is not the tokenizer of the weights in {source}: every id means something else "
            "than they have learned",
            stacklevel=3,
        )


def _check_architecture(source: Path, found: ModelConfig, config: RunConfig) -> None:
    ours, theirs = config.model.to_dict(), found.to_dict()
    different = sorted(name for name in ours if ours[name] != theirs[name] and name not in _OF_POSITIONS)
    if different:
        name = different[0]
        raise UserError(
            f"{source} holds another architecture: {name} is {theirs[name]}, not {ours[name]}; "
            f"give --model.{name.replace('_', '-')} {theirs[name]}"
        )
