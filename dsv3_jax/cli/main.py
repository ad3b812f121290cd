"""The command line `dsv3 COMMAND ...`: runs the command, and turns a UserError into one line and exit code 2."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
from typing import NoReturn

from dsv3_jax import __version__
from dsv3_jax.errors import UserError, reason_of
from dsv3_jax.operating_system import check_supported, restart_with_huge_pages
from dsv3_jax.runs.interruption import Interrupted, Interruption
from dsv3_jax.terminal import replace_what_cannot_be_shown, say

# Name: module, summary. A module is imported when its command is called, so that dsv3 --help is fast.
COMMANDS = {
    "train": ("dsv3_jax.cli.train", "train a model, or resume a run"),
    "sft": ("dsv3_jax.cli.sft", "fine-tune a model on conversations"),
    "reward-model": ("dsv3_jax.cli.reward_model", "train a reward model on pairs of a better and a worse answer"),
    "generate": ("dsv3_jax.cli.generate", "write text with a trained model"),
    "chat": ("dsv3_jax.cli.chat", "chat with a trained model in the terminal"),
    "serve": ("dsv3_jax.cli.serve", "serve a trained model over HTTP: OpenAI's API and a chat page"),
    "sample": ("dsv3_jax.cli.sample", "draw completions of problems, score them, and keep the good ones"),
    "grpo": ("dsv3_jax.cli.grpo", "train a model by reward: reinforcement learning on problems that a rule checks"),
    "eval": ("dsv3_jax.cli.evaluate", "evaluate a run: validation loss, bits per byte, MTP acceptance"),
    "inspect": ("dsv3_jax.cli.inspect", "show what a run or a published checkpoint is"),
    "import-hf": ("dsv3_jax.cli.import_hf", "turn a published checkpoint into a run folder"),
    "export-hf": ("dsv3_jax.cli.export_hf", "write a run as a checkpoint in the published layout"),
    "plan": ("dsv3_jax.cli.plan", "estimate memory, time and cost of a run on a cluster before starting it"),
}

_EXAMPLE = "dsv3 train --preset nano --out runs/nano"


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0 when done, 2 after bad input, 128 + n after signal n."""
    arguments = sys.argv[1:] if argv is None else argv
    replace_what_cannot_be_shown()
    try:
        check_supported()
        with Interruption(lambda: "dsv3: stopped"):
            exit_code = _run(arguments)
            sys.stdout.flush()
            return exit_code
    except UserError as error:
        return _fail(str(error))
    except Interrupted as stop:
        return _fail("stopped", stop.exit_code)
    except BrokenPipeError:
        _drop_output()
        return 141
    except OSError as error:
        # Where the system refuses what is asked, as on a full disk, there is nothing to mend in the program.
        _drop_output()
        return _fail(f"{f'{error.filename}: ' if error.filename else ''}{reason_of(error)}")
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or str(error).startswith("RESOURCE_EXHAUSTED")):
            raise
        return _fail(f"not enough memory: {reason_of(error)}; dsv3 plan estimates what a run takes")


def command() -> NoReturn:
    """Runs the command line as a program."""
    if len(sys.argv) > 2:  # a command with options; lists of commands and the version are printed at once
        restart_with_huge_pages()
    exit_code = main()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # Python's own handler prints a traceback while the interpreter ends
    sys.exit(exit_code)


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if arguments else 2
    if arguments == ["--version"]:
        print(f"dsv3 {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        from dsv3_jax.cli.options import suggest

        raise UserError(f"there is no command '{name}'; {suggest(name, list(COMMANDS))}")
    from dsv3_jax.cli.options import check_repeats

    check_repeats(rest)
    if any(word.startswith("--processes.") for word in rest):
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # no pages about lost processes, of which `runs.peers` tells
    return importlib.import_module(COMMANDS[name][0]).main(rest)


def _fail(text: str, exit_code: int = 2) -> int:
    """Prints one line on stderr and returns the exit code."""
    with contextlib.suppress(OSError):
        say(f"dsv3: {' '.join(text.split())}", to=sys.stderr)
    return exit_code


def _drop_output() -> None:
    """Lets Python end although its output cannot be written: what is left of it goes nowhere."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _help() -> str:
    lines = ["usage: dsv3 COMMAND ...    (dsv3 COMMAND --help shows its options, dsv3 --version the version)", ""]
    lines += [f"  {name:10s} {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join([*lines, "", f"example:  {_EXAMPLE}"])


if __name__ == "__main__":
    command()
