"""The command line `dsv3 COMMAND ...`: runs the command, and turns a UserError into one line and exit code 2."""

from __future__ import annotations

import importlib
import sys

from dsv3_jax.cli.options import suggest
from dsv3_jax.errors import UserError
from dsv3_jax.terminal import replace_what_cannot_be_shown, say

# Name: module, summary. A module is imported when its command is called, so that dsv3 --help is fast.
COMMANDS = {
    "train": ("dsv3_jax.cli.train", "train a model, or resume a run"),
    "generate": ("dsv3_jax.cli.generate", "write text with a trained model"),
    "eval": ("dsv3_jax.cli.evaluate", "evaluate a run: validation loss, bits per byte, MTP acceptance"),
    "import-hf": ("dsv3_jax.cli.import_hf", "turn a published checkpoint into a run folder"),
    "export-hf": ("dsv3_jax.cli.export_hf", "write a run as a checkpoint in the published layout"),
    "plan": ("dsv3_jax.cli.plan", "estimate memory, time and cost of a run on a cluster before starting it"),
}

_EXAMPLE = "dsv3 train --preset nano --out runs/nano"


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0 when done, 2 after bad input, 128 + n after signal n."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if arguments else 2
    name, *rest = arguments
    replace_what_cannot_be_shown()
    try:
        if name not in COMMANDS:
            raise UserError(f"there is no command '{name}'; {suggest(name, list(COMMANDS))}")
        return importlib.import_module(COMMANDS[name][0]).main(rest)
    except UserError as error:
        say(f"dsv3: {' '.join(str(error).split())}", to=sys.stderr)
        return 2
    except BrokenPipeError:
        return 141
    except KeyboardInterrupt:
        return 130


def _help() -> str:
    lines = ["usage: dsv3 COMMAND ...    (dsv3 COMMAND --help shows its options)", ""]
    lines += [f"  {name:10s} {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join([*lines, "", f"example:  {_EXAMPLE}"])


if __name__ == "__main__":
    sys.exit(main())
