"""Shows where a training step on a CPU spends its time, from a trace that jax.profiler takes.

    python experiments/benchmarks/step_profile.py --preset nano --precision float32 bfloat16

XLA's CPU backend runs a step as a sequence of small programs, thunks. For each recipe the script prints the time of a
step, the number of thunks of each kind of operation with the time they take together, and the largest of them with the
place in the source that they come from. Times of thunks that run side by side on several cores are added up.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.profiler import ProfileData

from dsv3_jax import default_run
from dsv3_jax.operating_system import restart_with_huge_pages
from dsv3_jax.runs.checkpoints import make_model
from dsv3_jax.training.state import new_state
from dsv3_jax.training.step import StepSettings, make_train_step

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>\(.*?\)|\S+) (?P<operation>[\w\-]+)\(")
_PLACE = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass
class Thunks:
    """The executions of one instruction, or of several, in the traced steps.

    Attributes:
      count: how many.
      seconds: how long they took together.
    """

    count: int = 0
    seconds: float = 0.0

    def add(self, other: Thunks) -> None:
        """Adds other executions."""
        self.count += other.count
        self.seconds += other.seconds


def instructions(program: str) -> dict[str, tuple[str, str]]:
    """Returns the kind of operation, with its shape, and the place in the source of each instruction of an HLO text."""
    found = {}
    for line in program.splitlines():
        if match := _INSTRUCTION.match(line):
            place = _PLACE.search(line)
            shape = re.sub(r"\{[^{}]*\}", "", match["shape"])
            found[match["name"]] = (f"{match['operation']} {shape}", place[1] if place else "")
    return found


def thunks_of(trace: Path, names: Iterable[str]) -> dict[str, Thunks]:
    """Returns the executions of each named instruction in the trace of a folder."""
    known = set(names)
    found: dict[str, Thunks] = defaultdict(Thunks)
    (file,) = trace.rglob("*.xplane.pb")
    for plane in ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            for event in line.events:
                name = event.name.removeprefix("%")
                if name in known:
                    found[name].add(Thunks(1, event.duration_ns * 1e-9))
    return found


def kind_of(name: str) -> str:
    """Returns what an instruction does, from its name: XLA names a fusion after the operations it joins."""
    return re.sub(r"[.\d]+$", "", re.sub(r"\.(clone|remat|sunk)\b", "", name))


def profile(preset: str, precision: str, batch: int, length: int, steps: int, changes: dict[str, Any]) -> None:
    """Prints the profile of one recipe."""
    run = default_run(preset)
    run = dataclasses.replace(run, precision=precision, model=run.model.replace(**changes))
    skeleton, state = new_state(make_model(run), run)
    rows = (1, batch or run.training.batch_size, (length or run.data.sequence_length) + 1)
    tokens = jax.random.randint(jax.random.key(0), rows, 0, run.model.vocab_size)
    segments = jnp.ones(rows, jnp.int32)
    settings = StepSettings(*(jnp.float32(value) for value in (1e-3, 1e-3, 1e-4, 0.3)))
    began = time.perf_counter()
    step = make_train_step(skeleton, run).lower(state, tokens, segments, settings).compile()
    compiled = time.perf_counter() - began
    seconds = []
    for _ in range(steps + 1):
        began = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, tokens, segments, settings))
        seconds.append(time.perf_counter() - began)
    known = instructions(step.as_text())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                state, _ = jax.block_until_ready(step(state, tokens, segments, settings))
        thunks = thunks_of(Path(folder), known)
    usual, least = statistics.median(seconds[1:]) * 1e3, min(seconds) * 1e3
    print(f"\n{preset}, {precision}, {rows[1]} x {rows[2] - 1} tokens: {usual:.0f} ms a step, at least {least:.0f} ms;")
    print(f"{len(thunks)} instructions run as thunks; compiled in {compiled:.1f} s")
    by_kind: dict[str, Thunks] = defaultdict(Thunks)
    for name, ran in thunks.items():
        by_kind[kind_of(name)].add(ran)
    total = sum(ran.seconds for ran in by_kind.values())
    print(f"{'a step: thunks':>15} {'ms':>8} {'share':>6}  kind")
    for kind, ran in largest(by_kind, 32):
        print(f"{ran.count / steps:15.0f} {ran.seconds / steps * 1e3:8.2f} {ran.seconds / total:6.1%}  {kind}")
    print(f"{sum(ran.count for ran in by_kind.values()) / steps:15.0f} {total / steps * 1e3:8.2f}   100%  all")
    print("the instructions that take longest:")
    for name, ran in largest(thunks, 40):
        what, place = known[name]
        line = f"{ran.count / steps:6.0f} x {ran.seconds / ran.count * 1e3:7.3f} ms  {name}: {what}"
        print(f"{line[:90]:90}  {place[-100:]}")


def largest(thunks: dict[str, Thunks], count: int) -> list[tuple[str, Thunks]]:
    """Returns the `count` entries that take longest, the longest first."""
    return sorted(thunks.items(), key=lambda item: -item[1].seconds)[:count]


def main() -> None:
    """Profiles each recipe of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="nano", help="size of the model")
    parser.add_argument("--precision", nargs="+", default=["float32"], help="recipes")
    parser.add_argument("--batch", type=int, default=0, help="sequences per step; the preset's with 0")
    parser.add_argument("--length", type=int, default=0, help="tokens per sequence; the preset's with 0")
    parser.add_argument("--steps", type=int, default=10, help="steps to trace")
    parser.add_argument("--experts", type=int, default=0, help="routed experts; the preset's with 0")
    options = parser.parse_args()
    changes = {"n_routed_experts": options.experts} if options.experts else {}
    for precision in options.precision:
        profile(options.preset, precision, options.batch, options.length, options.steps, changes)


if __name__ == "__main__":
    restart_with_huge_pages()  # as `dsv3 train` does
    main()
