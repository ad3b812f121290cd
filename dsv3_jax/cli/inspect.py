"""The command `dsv3 inspect`."""

from __future__ import annotations

import argparse
import inspect
import textwrap
from pathlib import Path
from typing import Any

from dsv3_jax.cli.options import OptionParser, notes, number
from dsv3_jax.errors import UserError
from dsv3_jax.regular_files import read_regular
from dsv3_jax.terminal import say

_SHOWN = 5  # weights at each end of the list
_LARGEST_TEXT = 4_000_000  # bytes
_DESCRIPTION = """Show what a run or a published checkpoint is: architecture and counts, tokenizer, router biases.

Of a run also its largest and smallest weights, and how a text is spread over its experts. Of a published checkpoint
only the headers of its files and the router biases are read, so that a model of any size is shown at once.
"""
_EXAMPLES = """examples:
  dsv3 inspect runs/nano
  dsv3 inspect runs/nano --text-file README.md --json
  dsv3 inspect ~/DeepSeek-R1
"""


def main(argv: list[str]) -> int:
    """Prints the facts about a run or a published checkpoint and returns the exit code.

    Raises:
      UserError: the folder is neither, or a file in it is damaged.
    """
    options = _parser().parse_args(argv)
    from dsv3_jax.runs.folder import RunFolder

    run = RunFolder(options.folder)
    if run.checkpoints.is_dir():
        facts = _of_run(options)
    elif (options.folder / "config.json").exists():
        facts = _of_published(options)
    else:
        raise UserError(f"{options.folder} holds neither a run nor a checkpoint: it has no config.json")
    if options.json:
        import json

        print(json.dumps(facts))
    else:
        for title, content in facts.items():
            say(f"{title}\n{textwrap.indent(_text(content), '  ')}\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = OptionParser("dsv3 inspect", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("folder", metavar="RUN_OR_FOLDER", type=Path, help="folder of a run or published checkpoint")
    parser.add_argument("--step", type=number(int, 0, 10**18), help="step of the checkpoint (default: the newest)")
    parser.add_argument(
        "--text-file",
        type=Path,
        help="text whose spread over the experts is shown (default: the source code of Python's module textwrap)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with every weight")
    return parser


def _of_run(options: argparse.Namespace) -> dict[str, Any]:
    import numpy as np

    from dsv3_jax.cli.compilation_cache import keep_compiled_programs
    from dsv3_jax.evaluation import inspection
    from dsv3_jax.model import router_biases
    from dsv3_jax.runs.checkpoints import load_run

    text = _text_of(options.text_file)
    keep_compiled_programs()
    with notes():
        loaded = load_run(options.folder, step=options.step)
    model, saved = loaded.model, loaded.saved
    config, weights = model.config, inspection.weight_facts(model)
    run = {"step": saved.position.step, "tokens": saved.position.tokens, "preset": saved.config.preset}
    facts: dict[str, Any] = {
        "run": run | {"precision": saved.config.precision},
        "architecture": inspection.architecture_facts(config),
        "tokenizer": inspection.tokenizer_facts(saved.tokenizer),
    }
    if config.num_moe_layers:
        ids = saved.tokenizer.prompt_ids(text, control_tokens=False)
        load = inspection.expert_load(model, ids)
        facts["router biases"] = inspection.bias_facts(np.asarray(router_biases(model)), config)
        facts[f"expert load over {len(ids):,} tokens"] = inspection.load_facts(load, config)
    if options.json:
        return facts | {"weights": weights}
    return facts | {"largest weights": weights[:_SHOWN], "smallest weights": weights[-_SHOWN:]}


def _of_published(options: argparse.Namespace) -> dict[str, Any]:
    from dsv3_jax.data import Tokenizer
    from dsv3_jax.evaluation import inspection
    from dsv3_jax.interop.account import take_account
    from dsv3_jax.interop.hf_config import read_config
    from dsv3_jax.interop.published_checkpoint import open_published

    for name in ("step", "text_file"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} needs a run; import-hf makes one of a published checkpoint")
    published = read_config(options.folder)
    facts: dict[str, Any] = {"architecture": inspection.architecture_facts(published.model)}
    if any((options.folder / name).exists() for name in ("tokenizer.json", "tokenizer.json.gz")):
        with notes():
            facts["tokenizer"] = inspection.tokenizer_facts(Tokenizer.load(options.folder))
    if not any(options.folder.glob("*.safetensors*")):
        return facts | {"files": {"weights": "not in this folder"}}
    checkpoint, published = open_published(options.folder, headers=False)
    account = take_account(checkpoint, published)
    facts["architecture"] = inspection.architecture_facts(account.config)
    facts["files"] = inspection.stored_facts(checkpoint, account)
    biases = inspection.stored_biases(checkpoint, account)
    if biases is not None:
        facts["router biases"] = inspection.bias_facts(biases, account.config)
    if account.notices:
        facts["notices"] = {str(count): line for count, line in enumerate(account.notices, start=1)}
    return facts


def _text_of(file: Path | None) -> str:
    if file is None:
        return inspect.getsource(textwrap)
    try:
        text = read_regular(file, max_bytes=_LARGEST_TEXT).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 at byte {error.start}") from None
    if not text:
        raise UserError(f"{file} is empty: give a text to spread over the experts")
    return text


def _text(content: dict[str, Any] | list[dict[str, Any]]) -> str:
    """Returns facts as lines of a name and a value, or a list of them as a table."""
    if isinstance(content, dict):
        width = max(map(len, content))
        return "\n".join(f"{name:{width}}  {value}" for name, value in content.items())
    rows = [list(content[0]), *([_cell(value) for value in row.values()] for row in content)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
