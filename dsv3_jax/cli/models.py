"""The model that a command writes text with: a run's newest checkpoint, or a published checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv3_jax.cli.options import notes
from dsv3_jax.errors import ConfigError, UserError
from dsv3_jax.terminal import say

if TYPE_CHECKING:
    from dsv3_jax.data import Tokenizer
    from dsv3_jax.inference import DeviceSets, Sampler
    from dsv3_jax.model import DeepSeekV3

_PUBLISHED = ("model.safetensors", "model.safetensors.index.json")


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model, its tokenizer, and in words which checkpoint it is."""

    model: DeepSeekV3
    tokenizer: Tokenizer
    note: str


def add_sets(parser: argparse.ArgumentParser) -> None:
    """Adds the options --prefill and --decode."""
    from dsv3_jax.sharding.mesh import MeshConfig

    def mesh(text: str) -> MeshConfig:
        try:
            return MeshConfig.parse(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    parser.add_argument(
        "--prefill",
        type=mesh,
        metavar="AXIS=N,...",
        help="devices that read prompts, such as expert=4, apart from those of --decode that generate; axes: data, "
        "fsdp, expert, tensor; -1 takes all devices that are left (default: one device does both)",
    )
    parser.add_argument("--decode", type=mesh, metavar="AXIS=N,...", help="devices that generate")


def sets_of(arguments: argparse.Namespace) -> DeviceSets | None:
    """Returns the two sets of devices of --prefill and --decode, or None without them.

    Raises:
      UserError: only one of them is given, or they cannot be.
    """
    if arguments.prefill is None and arguments.decode is None:
        return None
    if arguments.prefill is None or arguments.decode is None:
        raise UserError("--prefill and --decode are two sets of devices: give both, such as expert=4 and expert=4")
    from dsv3_jax.inference import DeviceSets

    return DeviceSets(prefill=arguments.prefill, decode=arguments.decode)


def load_model(folder: Path, dtype: str | None, step: int | None = None, sets: DeviceSets | None = None) -> Loaded:
    """Loads a checkpoint of a run, or a folder in the published layout.

    Args:
      dtype: float32 or bfloat16; that of the checkpoint if None.
      step: the step of the run's checkpoint; the newest undamaged one if None.
      sets: the weights are read straight to the devices of the decode set, where two sets are given.

    Raises:
      UserError: the folder holds neither, what it holds cannot be used, or a published checkpoint is to have steps.
    """
    from dsv3_jax.cli.compilation_cache import keep_compiled_programs

    keep_compiled_programs()
    where: dict[str, Any] = {} if sets is None else {"devices": sets.devices()[1]}
    with notes():
        if any((folder / name).exists() for name in _PUBLISHED):
            if step is not None:
                raise UserError(f"{folder} is a published checkpoint, which has no steps; leave --step out")
            from dsv3_jax.interop import architecture_of, load_hf
            from dsv3_jax.interop.tokenizer_files import read_tokenizer
            from dsv3_jax.precision import Precision

            tokenizer = read_tokenizer(folder, architecture_of(folder).vocab_size)
            model = load_hf(folder, dtype=dtype, precision=Precision.preset("auto"), **where)
            return Loaded(model, tokenizer, f"the published checkpoint {folder}")
        from dsv3_jax.runs.checkpoints import load_run
        from dsv3_jax.runs.folder import RunFolder

        loaded = load_run(folder, step=step, dtype=dtype, **where)
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
