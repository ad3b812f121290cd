"""The command `dsv3 import-hf`."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from dsv3_jax.cli.options import OptionParser, notes
from dsv3_jax.errors import UserError
from dsv3_jax.terminal import say

if TYPE_CHECKING:
    from dsv3_jax.config import ModelConfig
    from dsv3_jax.data import Tokenizer
    from dsv3_jax.interop.stored_format import StoredFormat
    from dsv3_jax.model import DeepSeekV3
    from dsv3_jax.training.config import RunConfig

PUBLISHED = "published"
"""Folder, in the checkpoint of an imported run, of how the published checkpoint was stored."""

_DESCRIPTION = """Make a run folder from a checkpoint in the published layout (V3, R1, V3.1, V2, Moonlight, Kimi-K2).

The folder works like that of a training run: dsv3 generate, dsv3 eval, dsv3 export-hf, dsv3 train --init-from.
"""
_OTHER_TOKENIZERS = ("tiktoken.model", "tokenizer.model", "vocab.json")
_EXAMPLES = """examples:
  dsv3 import-hf ~/Moonlight-16B-A3B runs/moonlight
  dsv3 import-hf moonshotai/Moonlight-16B-A3B runs/moonlight
  dsv3 import-hf ~/DeepSeek-R1 --dry-run          check every tensor; config.json and the index are enough
"""


def main(argv: list[str]) -> int:
    """Imports a checkpoint, or with --dry-run prints what each tensor is used for; returns the exit code."""
    options = _parser().parse_args(argv)
    if options.target is None and not options.dry_run:
        raise UserError("DST is missing: the run folder to make (or give --dry-run)")
    if options.target is not None and (options.target.is_symlink() or options.target.exists()):
        raise UserError(f"{options.target}: is there already; choose a new folder")
    from dsv3_jax.interop.hub_checkpoint import checkpoint_path

    source = checkpoint_path(options.source, weights=not options.dry_run)
    if options.dry_run:
        return _dry_run(source, mtp=options.mtp)
    assert options.target is not None  # checked above
    _import(source, options.target, mtp=options.mtp, tokenizer=options.tokenizer)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = OptionParser("dsv3 import-hf", _DESCRIPTION, _EXAMPLES)
    parser.add_argument(
        "source",
        metavar="SRC",
        help="folder with config.json and safetensors, or OWNER/NAME[@REVISION] on the Hugging Face hub (extra hf)",
    )
    parser.add_argument("target", metavar="DST", type=Path, nargs="?", help="the run folder to make")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="only check that every tensor has its parameter and every parameter its tensors",
    )
    parser.add_argument("--no-mtp", dest="mtp", action="store_false", help="do not load the MTP modules")
    parser.add_argument(
        "--tokenizer", help="a tokenizer.json to use instead of the checkpoint's own, or 'byte' for one id per byte"
    )
    return parser


def _dry_run(source: Path, *, mtp: bool) -> int:
    from dsv3_jax.interop.account import take_account
    from dsv3_jax.interop.published_checkpoint import open_published

    checkpoint, published = open_published(source, headers=False)
    account = take_account(checkpoint, published, mtp=mtp)
    if checkpoint.entries is None:
        say("the weights are not here: names are checked against the architecture, dtypes and shapes are not")
    say(account.describe())
    return 0


def _import(source: Path, target: Path, *, mtp: bool, tokenizer: str | None) -> None:
    from dsv3_jax.interop.account import take_account
    from dsv3_jax.interop.importer import load_hf, original_format
    from dsv3_jax.interop.published_checkpoint import open_published
    from dsv3_jax.interop.whole_folder import whole_folder

    checkpoint, published = open_published(source)
    account = take_account(checkpoint, published, mtp=mtp)
    found = _tokenizer(checkpoint.path, tokenizer, account.config)
    with notes():
        model = load_hf(source, dtype="float32", mtp=mtp, progress=sys.stderr.isatty())
    with whole_folder(target) as writing:
        stored_format = original_format(checkpoint, account)
        _write_run(writing, model, found, account.config, stored_format)
    say(f"{target}: {account.tensor_count:,} tensors, {account.config.num_parameters(mtp=True):,} parameters")


def _tokenizer(source: Path, named: str | None, config: ModelConfig) -> Tokenizer:
    from dsv3_jax.data import Tokenizer
    from dsv3_jax.data.tokenizer_training import byte_tokenizer
    from dsv3_jax.interop.tokenizer_files import TOKENIZER_NAME, read_tokenizer

    if named is None and not (source / TOKENIZER_NAME).exists():
        others = [name for name in _OTHER_TOKENIZERS if (source / name).exists()]
        hint = f" (transformers can save one from {others[0]})" if others else ""
        raise UserError(
            f"{source}: has no {TOKENIZER_NAME}{hint}; give --tokenizer FILE, or --tokenizer byte for one id per byte, "
            "with which the weights' texts mean nothing"
        )
    with notes():
        if named != "byte":
            tokenizer = read_tokenizer(source if named is None else named, config.vocab_size)
            own = source / TOKENIZER_NAME
            if named is not None and own.exists() and Tokenizer.load(own).fingerprint != tokenizer.fingerprint:
                warnings.warn(f"{named} is another tokenizer than the checkpoint's own, {own}", stacklevel=2)
            return tokenizer
    tokenizer = Tokenizer(byte_tokenizer(), "the byte tokenizer")
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"--tokenizer byte has {tokenizer.vocab_size} ids, more than the model's {config.vocab_size}; "
            "give --tokenizer FILE"
        )
    return tokenizer


def _write_run(
    folder: Path, model: DeepSeekV3, tokenizer: Tokenizer, config: ModelConfig, stored: StoredFormat
) -> None:
    """Writes the folder of a run at step 0: configuration, tokenizer and one checkpoint."""
    from dsv3_jax.interop.stored_format import save_format
    from dsv3_jax.runs.checkpoints import Checkpoints
    from dsv3_jax.runs.folder import RunFolder
    from dsv3_jax.runs.saved_run import RunPosition
    from dsv3_jax.runs.starting_state import untrained_state

    run_config = _run_config(config, tokenizer)
    run = RunFolder(folder)
    run.write_config(run_config)
    tokenizer.save(run.tokenizer)
    checkpoints = Checkpoints(run, tokenizer, keep=1)
    state, position = untrained_state(model, run_config), RunPosition(step=0, tokens=0, data={})
    checkpoints.save(state, position, run_config, lambda folder: save_format(stored, folder / PUBLISHED))
    checkpoints.close()


def _run_config(config: ModelConfig, tokenizer: Tokenizer) -> RunConfig:
    """Returns a configuration for the model's run: no running average, and texts without fill-in-middle."""
    from dsv3_jax.data import DataConfig
    from dsv3_jax.training.config import RunConfig, TrainingConfig

    depth = config.num_nextn_predict_layers
    length = max(min(4096, config.max_position_embeddings), depth + 1)
    return RunConfig(
        preset="imported",
        model=config,
        data=DataConfig(vocab_size=tokenizer.vocab_size, sequence_length=length, fill_in_middle_rate=0.0),
        training=TrainingConfig(ema_decay=0.0),
    )
