"""Writes a run's numbers: metrics.jsonl (one line per step), TensorBoard files, and the terminal."""

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
    """One destination of a run's records."""

    def write(self, record: Record) -> None:
        """Writes the numbers of one step, or of an evaluation. `record["step"]` is the step."""
        ...

    def close(self) -> None:
        """Closes the files."""
        ...


class JsonLines:
    """Writes metrics.jsonl: all numbers at full precision, so that two runs can be compared bit for bit.

    Args:
      path: the file.
      last_step: the step that a run is resumed from. Lines of later steps are dropped; they will be written again.
    """

    def __init__(self, path: Path, last_step: int):
        self.path = path
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= last_step]
        write_atomically(path, "".join(kept))
        self._file = path.open("a", buffering=1)

    def write(self, record: Record) -> None:
        self._file.write(json.dumps({name: _json_number(value) for name, value in record.items()}) + "\n")

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Writes scalars for TensorBoard.

    Args:
      folder: where the files are written.
      last_step: the step that a run is resumed from. Later steps of an earlier start are purged.
    """

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
    """Shows a progress bar where the output is a terminal, and prints a line every `log_every` steps elsewhere.

    Args:
      steps: number of steps of the whole run.
      start: step that the run starts or resumes from.
      log_every: steps between lines; 0 for no lines.
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
        """Prints a line of text, above the progress bar if there is one."""
        self.console.print(text, markup=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _time_left(self, step: int) -> str:
        each = (time.monotonic() - self._began) / max(step - self._start, 1)
        seconds = round(each * (self._steps - step))
        return f"{seconds // 60}:{seconds % 60:02d}"


def describe(record: Record) -> str:
    """Returns the numbers of one step as a short line of text."""
    # The main loss, because the total loss jumps where the schedule lowers the weight of the MTP loss.
    parts = [f"loss {record['main_loss']:.3f}"]
    if "mtp_loss" in record:
        parts.append(f"mtp {record['mtp_loss']:.3f}")
    parts += [
        f"{record['tokens_per_second']:,.0f} tokens/s",
        f"gradient norm {record['gradient_norm']:.2f}",
        f"MaxVio {record['max_violation']:.2f}",
    ]
    if "mfu" in record:
        parts.append(f"MFU {record['mfu']:.1%}")
    return "  ".join(parts)


def read_metrics(path: Path) -> list[Record]:
    """Returns the records of a metrics.jsonl."""
    return [json.loads(line) for line in _lines(path)]


def _lines(path: Path) -> Iterator[str]:
    """Yields the complete lines: a process that is killed while writing may leave an incomplete one."""
    if not path.exists():
        return
    with path.open() as file:
        for line in file:
            if line.endswith("\n") and line.startswith("{"):
                yield line


def _json_number(value: Any) -> Any:
    """Returns NaN and infinity as strings, because JSON has no such numbers."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
