"""The model that a command writes text with: a run's newest checkpoint, or a published checkpoint."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dsv3_jax.cli.options import notes
from dsv3_jax.errors import UserError
from dsv3_jax.terminal import say

if TYPE_CHECKING:
    from dsv3_jax.data import Tokenizer
    from dsv3_jax.inference import Sampler
    from dsv3_jax.model import DeepSeekV3

_PUBLISHED = ("model.safetensors", "model.safetensors.index.json")


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model, its tokenizer, and in words which checkpoint it is."""

    model: DeepSeekV3
    tokenizer: Tokenizer
    note: str


def load_model(folder: Path, dtype: str | None, step: int | None = None) -> Loaded:
    """Loads a checkpoint of a run, or a folder in the published layout.

    Args:
      dtype: float32 or bfloat16; that of the checkpoint if None.
      step: the step of the run's checkpoint; the newest undamaged one if None.

    Raises:
      UserError: the folder holds neither, what it holds cannot be used, or a published checkpoint is to have steps.
    """
    from dsv3_jax.cli.compilation_cache import keep_compiled_programs

    keep_compiled_programs()
    with notes():
        if any((folder / name).exists() for name in _PUBLISHED):
            if step is not None:
                raise UserError(f"{folder} is a published checkpoint, which has no steps; leave --step out")
            from dsv3_jax.interop import architecture_of, load_hf
            from dsv3_jax.interop.tokenizer_files import read_tokenizer
            from dsv3_jax.precision import Precision

            tokenizer = read_tokenizer(folder, architecture_of(folder).vocab_size)
            model = load_hf(folder, dtype=dtype, precision=Precision.preset("auto"))
            return Loaded(model, tokenizer, f"the published checkpoint {folder}")
        from dsv3_jax.runs.checkpoints import load_run
        from dsv3_jax.runs.folder import RunFolder

        loaded = load_run(folder, step=step, dtype=dtype)
    note = f"step {loaded.saved.position.step}"
    if RunFolder(folder).is_in_training():
        note += ", the newest whole checkpoint of a run that is still training"
    return Loaded(loaded.model, loaded.saved.tokenizer, note)


def default_sampler(tokenizer: Tokenizer) -> Sampler:
    """Returns how tokens are chosen where the user does not say: as the model's authors do, else as DEFAULT does."""
    from dsv3_jax.inference import DEFAULT, Sampler

    theirs = tokenizer.settings
    if theirs.temperature is None:
        return DEFAULT
    text = f"temperature {theirs.temperature:g}" + (f", top-k {theirs.top_k}" if theirs.top_k else "")
    text += f", top-p {theirs.top_p:g}" if theirs.top_p else ""
    say(f"dsv3: note: {text}, as the checkpoint's generation_config.json says", to=sys.stderr)
    return Sampler(temperature=theirs.temperature, top_k=theirs.top_k, top_p=theirs.top_p)
