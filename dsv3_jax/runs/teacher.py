"""The model that a run distils: it is loaded beside the run's own and never saved with it."""

from __future__ import annotations

from pathlib import Path

from dsv3_jax.data import Tokenizer
from dsv3_jax.errors import UserError
from dsv3_jax.runs.checkpoints import load_checkpoint
from dsv3_jax.runs.folder import RunFolder
from dsv3_jax.runs.starting_point import tokenizer_of_source
from dsv3_jax.training.config import RunConfig
from dsv3_jax.training.distillation import Teacher
from dsv3_jax.training.state import split_model
from dsv3_jax.training.state_layout import StateLayout


def load_teacher(config: RunConfig, layout: StateLayout, tokenizer: Tokenizer) -> Teacher | None:
    """Returns the teacher of a run on the run's devices; None where it has none.

    Args:
      tokenizer: the run's.

    Raises:
      UserError: the teacher is neither a run nor a published checkpoint, or its ids mean other texts than the run's.
    """
    if not config.teacher.run:
        return None
    source = Path(config.teacher.run)
    theirs = Tokenizer.load(tokenizer_of_source(source))
    if theirs.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"--teacher.run {source} has another tokenizer than the run: only one with the same can teach it"
        )
    if RunFolder(source).checkpoints.is_dir():
        model = load_checkpoint(source, step=config.teacher.step or None, devices=layout.devices)[0]
    else:
        from dsv3_jax.interop import load_hf

        model = load_hf(source, dtype="bfloat16", devices=layout.devices)
    if model.config.vocab_size != config.model.vocab_size:
        raise UserError(
            f"--teacher.run {source} has {model.config.vocab_size} logits and the run {config.model.vocab_size}: "
            "both need one number for every token"
        )
    skeleton, params, biases = split_model(model)
    return Teacher(skeleton, params, biases)
