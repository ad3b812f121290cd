"""Options that the commands which train have in common."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv3_jax.cli.options import notes
from dsv3_jax.data import DataConfig
from dsv3_jax.data.corpus import STDLIB
from dsv3_jax.data.hub import HUB
from dsv3_jax.data.mixture import MIXTURE, parse_mixture
from dsv3_jax.runs.folder import by_dotted_name
from dsv3_jax.runs.peers import Peers
from dsv3_jax.runs.processes import Processes, ending_together, join, leave
from dsv3_jax.training.config import RunConfig, TeacherConfig


def value_of(argv: list[str], option: str) -> str | None:
    """Returns the value of one option before all are parsed; None where it is not given."""
    for word, following in itertools.zip_longest(argv, argv[1:]):
        if word == option:
            return following
        if word.startswith(f"{option}="):
            return word.split("=", 1)[1]
    return None


def with_absolute_paths(data: DataConfig, defaults: DataConfig) -> DataConfig:
    """Returns the data with paths that are right in any folder, from which the run is resumed or evaluated."""
    named = {"corpus": (STDLIB, defaults.corpus), "tokenizer": ("train", "byte", defaults.tokenizer)}
    values = {name: getattr(data, name) for name in named}
    paths = {name: os.path.abspath(value) for name, value in values.items() if value and value not in named[name]}
    if data.corpus.startswith(HUB):
        paths.pop("corpus", None)
    if data.corpus.startswith(MIXTURE):
        parts = [
            (with_absolute_paths(dataclasses.replace(data, corpus=name), defaults).corpus, count)
            for name, count in parse_mixture(data.corpus)
        ]
        paths["corpus"] = MIXTURE + "+".join(f"{count / 1000:g}*{name}" for name, count in parts)
    return dataclasses.replace(data, **paths)


def with_absolute_run(teacher: TeacherConfig) -> TeacherConfig:
    """Returns the teacher with a path that is right in any folder, from which the run is resumed."""
    return dataclasses.replace(teacher, run=os.path.abspath(teacher.run)) if teacher.run else teacher


def train_together(
    config: RunConfig, out: str, processes: Processes, named: dict[str, Any], start: Callable[[], dict[str, Any]]
) -> int:
    """Trains, together with the other processes if there are some, and returns the exit code.

    Args:
      out: folder of the run.
      named: what all processes must be given alike, beside `config` and `out`.
      start: returns the arguments of `train` that say what a new run starts from.
    """

    def run(peers: Peers | None) -> int:
        from dsv3_jax.runs.loop import train

        return train(config, Path(out), peers=peers, **start()).exit_code

    return run_together(config, out, processes, named, run)


def run_together(
    config: RunConfig, out: str, processes: Processes, named: dict[str, Any], run: Callable[[Peers | None], int]
) -> int:
    """Calls `run`, together with the other processes if there are some, and returns the exit code.

    Args:
      out: folder of the run.
      named: what all processes must be given alike, beside `config` and `out`.
      run: is given the other processes, and returns the exit code.
    """
    shared = {"out": str(Path(out).absolute()), **named, **by_dotted_name(config.to_dict())}
    with notes():
        peers = join(processes, shared)
    from dsv3_jax.cli.compilation_cache import keep_compiled_programs
    from dsv3_jax.precision import Precision

    with ending_together(peers), notes():
        Precision.preset(config.precision)
        keep_compiled_programs()
        exit_code = run(peers)
    return leave(peers, exit_code)
