"""The command `dsv3 export-hf`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dsv3_jax.cli.import_hf import PUBLISHED
from dsv3_jax.cli.options import OptionParser, notes, number
from dsv3_jax.errors import UserError
from dsv3_jax.terminal import say

if TYPE_CHECKING:
    from dsv3_jax.runs.checkpoints import LoadedRun

_DESCRIPTION = """Write a run's newest checkpoint in the form that transformers and serving engines read: safetensors
with an index, config.json and tokenizer, MTP layers included.
"""
_EXAMPLES = """examples:
  dsv3 export-hf runs/nano exported
  dsv3 export-hf runs/nano exported-fp8 --dtype fp8
  dsv3 export-hf runs/lora adapters --adapters
"""


def main(argv: list[str]) -> int:
    """Exports a run; returns the exit code."""
    options = _parser().parse_args(argv)
    if options.ue8m0 and options.dtype != "fp8":
        raise UserError("--ue8m0 is about FP8 scales: it needs --dtype fp8")
    if options.target.is_symlink() or options.target.exists():
        raise UserError(f"{options.target}: is there already; choose a new folder")
    from dsv3_jax.interop import save_hf
    from dsv3_jax.interop.stored_format import load_format
    from dsv3_jax.runs.checkpoints import load_run

    with notes():
        loaded = load_run(options.run, step=options.step, dtype="bfloat16" if options.dtype == "bfloat16" else None)
    if options.adapters:
        return _export_adapters(loaded, options.run, options.target)
    model, saved, step = loaded.model, loaded.saved, loaded.saved.position.step
    imported = not (options.dtype or step)  # an imported run that was not trained has its checkpoint's dtypes
    save_hf(
        model,
        options.target,
        dtype=options.dtype,
        power_of_two_scales=options.ue8m0,
        stored_format=load_format(saved.path / PUBLISHED, model.config) if imported else None,
        tokenizer=saved.tokenizer,
        max_shard_bytes=int(options.max_shard_gb * 1e9),
        progress=sys.stderr.isatty(),
    )
    say(f"{options.target}: step {step} of {options.run}, {model.config.num_parameters(mtp=True):,} parameters")
    return 0


def _export_adapters(loaded: LoadedRun, run: Path, target: Path) -> int:
    from dsv3_jax.interop.adapter_files import save_adapters
    from dsv3_jax.training.adapters import peft_config, published_adapters

    model, lora = loaded.saved.config.model, loaded.saved.config.lora
    if loaded.adapters is None:
        raise UserError(f"{run} has no adapters, which dsv3 sft --lora.rank trains; leave out --adapters")
    save_adapters(target, published_adapters(loaded.adapters, model, lora), peft_config(model, lora, str(run)))
    say(f"{target}: adapters of step {loaded.saved.position.step} of {run}, in the layout of PEFT")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = OptionParser("dsv3 export-hf", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run")
    parser.add_argument("target", metavar="DST", type=Path, help="new folder")
    parser.add_argument("--adapters", action="store_true", help="write only the low-rank adapters, as PEFT does")
    parser.add_argument("--step", type=number(int, 0, 10**18), help="step of the checkpoint (default: the newest)")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "fp8"],
        help="how weights are stored (default: float32; an imported run that was not trained: as its checkpoint was)",
    )
    parser.add_argument("--ue8m0", action="store_true", help="make FP8 scales powers of two, as in V3.1")
    parser.add_argument(
        "--max-shard-gb", type=number(float, 1e-6, 1000), default=5.0, help="largest size of a shard in GB (default 5)"
    )
    return parser
