"""Writes a run's numbers: metrics.jsonl (one line per step), TensorBoard files, and the terminal."""

from __future__ import annotations

import json
import math
import socket
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from dsv3_jax.runs.appended_file import AppendedFile
from dsv3_jax.runs.folder import write_atomically, writing
from dsv3_jax.terminal import printable

Record = dict[str, Any]

_WIDE = 1000  # characters of a line that is not shown in a terminal


class JsonLines:
    """Writes metrics.jsonl: all numbers at full precision, so that two runs can be compared bit for bit.

    Args:
      path: the file.
      last_step: the step that a run is resumed from. Lines of later steps are dropped; they will be written again.
      report: is called with a line of text where lines are damaged, which are left out.
    """

    def __init__(self, path: Path, last_step: int, report: Callable[[str], None]):
        lines, damage = _read_lines(path)
        if damage:
            report(damage)
        kept = {_kind(record): line for line, record in lines if record["step"] <= last_step}
        self._written = set(kept)
        write_atomically(path, "".join(kept.values()))
        self._file = AppendedFile(path)

    def holds(self, record: Record) -> bool:
        """Returns whether the record of this step, or of the evaluation after it, is there already."""
        return _kind(record) in self._written

    def write(self, record: Record) -> None:
        """Writes the numbers of a step or of an evaluation; `record["step"]` is the step."""
        self._written.add(_kind(record))
        line = json.dumps(json_value(record)) + "\n"
        self._file.write(line.encode())

    def flush(self) -> None:
        """Waits until everything is on the disk."""
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoard:
    """Writes scalars for TensorBoard.

    Args:
      folder: where the files are written.
      last_step: the step that a run is resumed from. Later steps of an earlier start are purged.
    """

    def __init__(self, folder: Path, last_step: int):
        # Without the library's own writer, whose thread prints pages of tracebacks when the disk is full.
        from tensorboardX.crc32c import crc32c
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        self._event, self._summary, self._crc = Event, Summary, crc32c
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._file = AppendedFile(folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}")
        self._add(Event(file_version="brain.Event:2"))
        self._add(Event(step=last_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, record: Record) -> None:
        """Writes the numbers of a step or of an evaluation; `record["step"]` is the step."""
        numbers = {n: v for n, v in record.items() if n != "step" and isinstance(v, int | float)}
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._add(self._event(step=record["step"], summary=self._summary(value=values)))

    def flush(self) -> None:
        """Waits until everything is on the disk."""
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _add(self, event: Any) -> None:
        event.wall_time = time.time()
        content = event.SerializeToString()
        size = struct.pack("<Q", len(content))
        self._file.write(size + self._masked_crc(size) + content + self._masked_crc(content))

    def _masked_crc(self, content: bytes) -> bytes:
        """Returns the checksum that the TFRecord format puts after each part of a record."""
        crc = self._crc(content)
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


class Terminal:
    """Shows a progress bar where the output is a terminal, and prints a line every `log_every` steps elsewhere.

    Args:
      steps: number of steps of the whole run.
      start: step that the run starts or resumes from.
      log_every: steps between lines; 0 for no lines.
      describe: returns the numbers of a step as a line of at most so many characters.
    """

    def __init__(self, steps: int, start: int, log_every: int, describe: Callable[[Record, int], str]):
        self.console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._steps, self._start, self._log_every = steps, start, log_every
        self._describe = describe
        self._began = time.monotonic()
        self._bar = None
        if self.console.is_terminal:
            width = self.console.width
            bar = 24 if width >= 120 else 10
            self._room = width - bar - len(f"step {steps}/{steps}") - len("0:00:00") - 3  # for the numbers of a step
            self._bar = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=bar),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
                console=self.console,
            )
            self._task = self._bar.add_task("train", total=steps, completed=start, text="compiling")
            self._bar.start()

    def write(self, record: Record) -> None:
        """Shows the numbers of a step."""
        step = record["step"]
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=self._describe(record, self._room))
        elif self._log_every and (step % self._log_every == 0 or step in (self._start + 1, self._steps)):
            self.say(f"step {step}/{self._steps}  {self._describe(record, _WIDE)}  {self._time_left(step)} left")

    def say(self, text: str) -> None:
        """Prints a line of text, above the progress bar if there is one."""
        self.console.print(printable(text), markup=False)

    def close(self) -> None:
        """Removes the progress bar."""
        if self._bar is not None:
            self._bar.stop()

    def _time_left(self, step: int) -> str:
        each = (time.monotonic() - self._began) / max(step - self._start, 1)
        seconds = round(each * (self._steps - step))
        return f"{seconds // 60}:{seconds % 60:02d}"


def describe(record: Record, room: int) -> str:
    """Returns the numbers of one step as a line of text of at most `room` characters, the most important ones first."""
    # The main loss, because the total loss jumps where the schedule lowers the weight of the MTP loss.
    parts = [f"main loss {record['main_loss']:.3f}"]
    if "mtp_loss" in record:
        parts.append(f"mtp {record['mtp_loss']:.3f}")
    parts += [
        f"{record['tokens_per_second']:,.0f} tokens/s",
        f"gradient norm {record['gradient_norm']:.2f}",
        f"MaxVio {record['max_violation']:.2f}",
    ]
    if "mfu" in record:
        parts.append(f"MFU {record['mfu']:.1%}")
    return joined(parts, room)


def joined(parts: list[str], room: int) -> str:
    """Returns as many of the parts, from the first, as fit in a line of `room` characters; the first always does."""
    while len(parts) > 1 and len("  ".join(parts)) > room:
        parts = parts[:-1]
    return "  ".join(parts)


def read_metrics(path: Path) -> list[Record]:
    """Returns the records of a metrics.jsonl; lines that are damaged are left out."""
    return [record for _, record in _read_lines(path)[0]]


def _read_lines(path: Path) -> tuple[list[tuple[str, Record]], str]:
    """Returns the lines that hold a record, each with its record, and a sentence about the others.

    An incomplete line at the end, which a process that is killed while writing may leave, is not worth a sentence.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    except OSError as error:
        return [], f"{path} cannot be read ({error.strerror}): what it recorded is left out"
    found, damaged = [], []
    for number, line in enumerate(lines, start=1):
        record = _record(line)
        if record is not None:
            found.append((line.decode(), record))
        elif number < len(lines) or line.endswith(b"\n"):
            damaged.append(number)
    if not damaged:
        return found, ""
    what = f"line {damaged[0]} is" if len(damaged) == 1 else f"{len(damaged)} lines from line {damaged[0]} on are"
    return found, f"{path}: {what} damaged and left out"


def _record(line: bytes) -> Record | None:
    """Returns the record in a line; None where the line does not hold a whole one."""
    try:
        record = json.loads(line.decode()) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    values = record.values()
    right = all(type(value) in (int, float) or value in ("nan", "inf", "-inf") for value in values)
    return record if right and len(record) > 1 else None


def _kind(record: Record) -> tuple[int, bool]:
    """Returns what a run records once: a step, or the evaluation after a step."""
    return record["step"], any(name.startswith("validation_") for name in record)


def json_value(value: Any) -> Any:
    """Returns a value, or a tree of dictionaries and sequences, with NaN and infinity as strings.

    JSON has no such numbers.
    """
    if isinstance(value, dict):
        return {name: json_value(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
