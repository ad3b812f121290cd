"""`dsv3 COMMAND ...`: finds the command, and turns a mendable error into one line and exit code 2."""

from __future__ import annotations

import importlib
import importlib.util
import sys

from dsv3_jax.cli.options import suggest
from dsv3_jax.errors import UserError

# Name: module, summary. Modules are imported when their command is called, so that --help is instant.
COMMANDS = {
    "train": ("dsv3_jax.cli.train", "train a model, or go on with a run"),
    "generate": ("dsv3_jax.cli.generate", "write text with a trained model"),
    "eval": ("dsv3_jax.cli.evaluate", "validation loss, bits per byte and MTP acceptance of a run"),
    "import-hf": ("dsv3_jax.cli.import_hf", "make a run of a published checkpoint"),
    "export-hf": ("dsv3_jax.cli.export_hf", "write a run in the published checkpoint layout"),
    "plan": ("dsv3_jax.cli.plan", "memory, time and cost of a run on a cluster, before it is started"),
}

_EXAMPLE = "dsv3 train --preset nano --out runs/nano"


def available_commands() -> dict[str, tuple[str, str]]:
    """The commands whose modules are installed."""
    return {name: entry for name, entry in COMMANDS.items() if importlib.util.find_spec(entry[0]) is not None}


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0 done, 2 bad input, 128 + n stopped by signal n."""
    arguments = sys.argv[1:] if argv is None else argv
    commands = available_commands()
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help(commands))
        return 0 if arguments else 2
    name, *rest = arguments
    try:
        if name not in commands:
            raise UserError(f"there is no command '{name}'; {suggest(name, list(commands))}")
        return importlib.import_module(commands[name][0]).main(rest)
    except UserError as error:
        print(f"dsv3: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 141
    except KeyboardInterrupt:
        return 130


def _help(commands: dict[str, tuple[str, str]]) -> str:
    lines = ["usage: dsv3 COMMAND ...    (dsv3 COMMAND --help says more)", ""]
    lines += [f"  {name:10s} {summary}" for name, (_, summary) in commands.items()]
    return "\n".join([*lines, "", f"example:  {_EXAMPLE}"])


if __name__ == "__main__":
    sys.exit(main())
