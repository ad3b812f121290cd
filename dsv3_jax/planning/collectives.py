"""Reads the collectives of a compiled program from its HLO text: how often each runs, over which devices, and bytes."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter, defaultdict

from dsv3_jax.sharding.expert_layout import SELDOM

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "f8e4m3fn": 1, "f8e5m2": 1}

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) (?:\([^\n]*\) -> [^\n]*)?\{", re.M)
_INSTRUCTION = re.compile(
    rf"= (?P<shape>\(?[^=\n]*?\)?) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\((?P<rest>[^\n]*)"
)
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|(?:branch|true|false)_computations?)=(\{[^}]*\}|%?[\w.\-]+)")
ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """All runs of collectives of one kind and group size in one execution of the program.

    Attributes:
      kind: all-gather, all-reduce, reduce-scatter, all-to-all, ragged-all-to-all or collective-permute.
      group: devices that take part in each.
      runs: how often they run, loops included.
      sent: bytes that a device sends in all runs.
      largest: bytes of the largest result.
      hidden: the part of their time that runs beside computation (`planning.overlap`); None where the compiler does not
        say in which order instructions run.
    """

    kind: str
    group: int
    runs: int
    sent: float
    largest: float
    hidden: float | None = None


def read_collectives(hlo: str) -> list[Collective]:
    """Returns the collectives of a module in HLO text form, most bytes first.

    A loop whose number of passes the compiler does not know is counted once, and every branch of a conditional is
    counted. How many rows a ragged all-to-all sends is known only when it runs. It is counted with the smaller of its
    send and receive buffers, which are larger than what arrives under an even load.
    """
    bodies = computations(hlo)
    runs = executions(bodies, hlo)
    found: dict[tuple[str, int], list[tuple[int, float]]] = defaultdict(list)
    for name, body in bodies.items():
        for match in _INSTRUCTION.finditer(body) if runs[name] else ():
            kind, group, result = _described(match, body)
            found[kind, group].append((runs[name], result))
    collectives = [
        Collective(
            kind=kind,
            group=group,
            runs=sum(count for count, _ in items),
            sent=sum(count * _sent(kind, result, group) for count, result in items),
            largest=max(result for _, result in items),
        )
        for (kind, group), items in found.items()
        if group > 1
    ]
    return sorted(collectives, key=lambda item: -item.sent)


def sent_by(line: str, body: str) -> tuple[str, int, float] | None:
    """Returns kind and group size of the collective that a line of a computation begins, and the bytes it sends."""
    match = _INSTRUCTION.search(line)
    if match is None:
        return None
    kind, group, result = _described(match, body)
    return kind, group, _sent(kind, result, group)


def _described(match: re.Match[str], body: str) -> tuple[str, int, float]:
    """Returns kind and group size of a collective, and the bytes of its result."""
    kind, rest = match["kind"], match["rest"]
    group = _group_size(rest)
    if kind == "ragged-all-to-all":
        return kind, group, _rows_bytes(match["shape"], rest, body)
    return kind, group, _result_bytes(match["shape"], kind, started=match["start"] is not None, group=group)


def computations(hlo: str) -> dict[str, str]:
    """Returns name and text of every computation."""
    hlo = re.sub(r"/\*index=\d+\*/", "", hlo)  # counters in long tuples
    bodies = {}
    starts = list(_COMPUTATION.finditer(hlo))
    for start, following in zip(starts, [*starts[1:], None], strict=True):
        bodies[start[1]] = hlo[start.end() : following.start() if following else len(hlo)]
    return bodies


def executions(bodies: dict[str, str], hlo: str) -> Counter[str]:
    """Returns how often each computation runs in one execution of the program."""
    calls: dict[str, Counter[str]] = {name: Counter() for name in bodies}
    for name, body in bodies.items():
        for line in body.splitlines():
            times = passes(line, bodies) if " while(" in line else 1
            for called in _CALLED.finditer(line):
                for callee in re.findall(r"[\w.\-]+", called[1]):
                    if callee in calls:
                        calls[name][callee] += times
    entry = re.search(r"^ENTRY %?([\w.\-]+)", hlo, re.M)
    runs: Counter[str] = Counter()
    if entry:
        _visit(entry[1], 1, calls, runs)
    return runs


def passes(loop: str, bodies: dict[str, str]) -> int:
    """Returns the passes of a loop: those the compiler notes, or the one constant that its condition compares with.

    A loop that only an uneven load enters has none.
    """
    if SELDOM in loop:
        return 0
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop)
    body = bodies.get(condition[1], "") if condition else ""
    constants = re.findall(r"s32\[\]\S* constant\((\d+)\)", body)
    return int(constants[0]) if len(constants) == 1 and "direction=LT" in body else 1


def _visit(name: str, times: int, calls: dict[str, Counter[str]], runs: Counter[str]) -> None:
    runs[name] += times
    for callee, count in calls[name].items():
        _visit(callee, times * count, calls, runs)


def _group_size(rest: str) -> int:
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]", rest)
    if iota:
        return int(iota[1])
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", rest)
    if named:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])  # 'axis', or 'axis':(before)size of a part of it
        return math.prod(int(part) if part else sizes[name] for name, part in parts)
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
    if listed:
        return listed[1].count(",") + 1
    return 2 if "source_target_pairs" in rest else 1


def _result_bytes(shape: str, kind: str, *, started: bool, group: int) -> float:
    """Returns the bytes of the result; the shape of a started collective is (operands, results, ...)."""
    arrays = [array_bytes(*match) for match in ARRAY.findall(shape)]
    if not arrays:
        return 0.0
    if not started or kind == "all-reduce":
        return sum(arrays)
    if kind == "collective-permute":
        return arrays[1] if len(arrays) > 1 else arrays[0]
    return sum(arrays[len(arrays) // 2 :])


def _rows_bytes(shape: str, rest: str, body: str) -> float:
    """Returns the bytes of the smaller buffer of a ragged all-to-all.

    The buffers are in its shape, which may include operands, and its first operand; offsets and sizes have one axis.
    """
    operand = re.match(r"%?([\w.\-]+)", rest)
    if operand:
        defined = re.search(rf"^\s*(?:ROOT )?%?{re.escape(operand[1])} = (\w+\[[\d,]*\])", body, re.M)
        shape = f"{shape} {defined[1]}" if defined else shape
    return min(array_bytes(*array) for array in ARRAY.findall(shape) if "," in array[1])


def array_bytes(dtype: str, dimensions: str) -> float:
    width = _BYTES.get(dtype)
    if width is None:
        digits = re.search(r"\d+", dtype)
        width = int(digits[0]) / 8 if digits else 0
    return width * math.prod(int(size) for size in dimensions.split(",") if size)


def _sent(kind: str, result: float, group: int) -> float:
    """Returns the bytes that a device sends, by the usual ring or direct algorithm."""
    others = (group - 1) / group
    factors = {"all-gather": others, "all-reduce": 2 * others, "reduce-scatter": group - 1, "collective-permute": 1.0}
    return result * factors.get(kind, others)
