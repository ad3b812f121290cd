"""Where a run's numbers go: a JSON line a step, TensorBoard, and the terminal."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from dsv3_jax.runs.folder import write_atomically

Record = dict[str, Any]


class Writer(Protocol):
    """Something that records steps."""

    def write(self, record: Record) -> None:
        """One step's numbers; `step` is among them."""
        ...

    def close(self) -> None: ...


class JsonLines:
    """metrics.jsonl: every number at full precision, so that two runs can be compared bit for bit.

    Args:
      path: the file.
      last_step: the step that a resumed run goes on from; later lines, of work that was lost, are dropped.
    """

    def __init__(self, path: Path, last_step: int):
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= last_step]
        write_atomically(path, "".join(kept))
        self._file = path.open("a", buffering=1)

    def write(self, record: Record) -> None:
        self._file.write(json.dumps({name: _json_number(value) for name, value in record.items()}) + "\n")

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Scalars for TensorBoard; steps after `last_step` of an earlier start are purged."""

    def __init__(self, folder: Path, last_step: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=last_step + 1, flush_secs=10)

    def write(self, record: Record) -> None:
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class Terminal:
    """A progress bar on a terminal, a line every `log_every` steps elsewhere.

    Args:
      steps: of the whole run.
      start: step the run goes on from.
      log_every: steps between lines where the output is no terminal; 0 for none.
    """

    def __init__(self, steps: int, start: int, log_every: int):
        self.console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._steps, self._start, self._log_every = steps, start, log_every
        self._began = time.monotonic()
        self._bar = None
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._bar.add_task("train", total=steps, completed=start, text="compiling")
            self._bar.start()

    def write(self, record: Record) -> None:
        text = describe(record)
        step = record["step"]
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
        elif self._log_every and (step % self._log_every == 0 or step in (self._start + 1, self._steps)):
            self.say(f"step {step}/{self._steps}  {text}  {self._time_left(step)} left")

    def say(self, text: str) -> None:
        """A line of text above the bar."""
        self.console.print(text, markup=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _time_left(self, step: int) -> str:
        each = (time.monotonic() - self._began) / max(step - self._start, 1)
        seconds = round(each * (self._steps - step))
        return f"{seconds // 60}:{seconds % 60:02d}"


class Quiet:
    """What processes other than the first say: nothing."""

    def write(self, record: Record) -> None:
        """Does nothing."""

    def say(self, text: str) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def describe(record: Record) -> str:
    """One step in a few words."""
    # Not the total: it jumps where the schedule lowers the weight of MTP.
    parts = [f"loss {record['main_loss']:.3f}"]
    if "mtp_loss" in record:
        parts.append(f"mtp {record['mtp_loss']:.3f}")
    parts += [
        f"{record['tokens_per_second']:,.0f} tokens/s",
        f"gradient {record['gradient_norm']:.2f}",
        f"MaxVio {record['max_violation']:.2f}",
    ]
    if "mfu" in record:
        parts.append(f"MFU {record['mfu']:.1%}")
    return "  ".join(parts)


def read_metrics(path: Path) -> list[Record]:
    """The records of a metrics.jsonl."""
    return [json.loads(line) for line in _lines(path)]


def _lines(path: Path) -> Iterator[str]:
    """Whole lines only: a process killed while writing may leave half of one."""
    if not path.exists():
        return
    with path.open() as file:
        for line in file:
            if line.endswith("\n") and line.startswith("{"):
                yield line


def _json_number(value: Any) -> Any:
    """JSON has no NaN or infinity: they become their names."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
