"""Reads from a compiled program's schedule how much of its communication runs beside computation.

A compiler that schedules writes its instructions in the order in which a device runs them. An asynchronous collective
is two of them: its start, and its done, at which the device waits. The reader goes through this order with two clocks:
computation takes its roofline time, and transfers over the same links follow one another.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

from dsv3_jax.planning.collectives import ARRAY, KINDS, array_bytes, computations, executions, passes, sent_by
from dsv3_jax.planning.config import PlanConfig
from dsv3_jax.planning.exchange import TokenExchange
from dsv3_jax.planning.hardware import Accelerator

_FREE = {
    *("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "partition-id", "after-all", "opt-barrier"),
    *("async-start", "async-update", "async-done", "copy-start", "copy-done", "iota", "add-dependency"),
}
_LINE = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\([^=]*?\)|\S+) ([\w\-]+)\(([^)]*)\)(.*)")
_CALLED = re.compile(r"(?:calls|body|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+))")
_FIRST_GROUP = re.compile(r"replica_groups=\{\{(\d+),(\d+)")
_KERNEL = re.compile(r'op_name="(?:[^"]*/)?([^"/]+)/[^"/]*"')
"""The name of a kernel is the scope in which it is called."""
_SCOPES = re.compile(r'op_name="([^"]*)"')
_SLICES = ("dynamic-slice", "gather", "slice")


@dataclasses.dataclass(frozen=True)
class EvenLoad:
    """Which part of the buffers for rows is filled if all experts have the same load.

    Attributes:
      hops: by hop the distance between its ranks, and the part of its smaller buffer that is sent.
      products: the part of the rows of an experts' product.
    """

    hops: tuple[tuple[int, float], ...] = ()
    products: float = 1.0


@dataclasses.dataclass
class Transfers:
    """All transfers of one kind.

    Attributes:
      seconds: time of their bytes over their links.
      exposed: time for which the device waits for them.
    """

    seconds: float = 0.0
    exposed: float = 0.0

    @property
    def hidden(self) -> float:
        """The part of the time that computation hides."""
        return max(1 - self.exposed / self.seconds, 0.0) if self.seconds else 0.0


@dataclasses.dataclass(frozen=True)
class Span:
    """A time for which a device computes or sends.

    Attributes:
      lane: "computation", "between nodes" or "within a node".
      what: the part of a layer, such as "attention, forward", or "all else".
      start, end: seconds.
    """

    lane: str
    what: str
    start: float
    end: float


def even_load(config: PlanConfig) -> EvenLoad:
    """Returns the filled parts of the buffers of `sharding.expert_parallel`, which are large enough for every load."""
    exchange = TokenExchange.of(config)
    hops = zip(exchange.hops, exchange.filled, strict=True)
    filled = tuple((hop.stride * config.mesh.tensor, part) for hop, part in hops)
    return EvenLoad(filled, exchange.tokens * config.model.num_experts_per_tok / exchange.product)


class _Instruction:
    """One line of a computation."""

    def __init__(self, match: re.Match[str], line: str) -> None:
        self.name, self.shape, self.opcode, operands, self.rest = match.groups()
        self.operands = re.findall(r"%([\w.\-]+)", operands) or re.findall(r"(?<![\w.\-])([\w.\-]+)", operands)
        self.line = line

    @functools.cached_property
    def arrays(self) -> list[tuple[str, str]]:
        """Dtype and dimensions of the results."""
        return ARRAY.findall(self.shape)

    @property
    def bytes(self) -> float:
        """Bytes of the results."""
        return sum(array_bytes(*array) for array in self.arrays)


@dataclasses.dataclass
class _Played:
    """How a computation runs: its seconds, own transfers and spans, and its loops (body, start, passes, part)."""

    seconds: float = 0.0
    transfers: dict[tuple[str, int], Transfers] = dataclasses.field(default_factory=lambda: defaultdict(Transfers))
    spans: list[Span] = dataclasses.field(default_factory=list)
    loops: list[tuple[str, float, int, str]] = dataclasses.field(default_factory=list)


class Schedule:
    """The order in which a compiled program runs its instructions, and how long they take.

    A product takes its operations at the rate that good kernels reach, or the bytes it reads and writes if that is
    longer; any other instruction takes its bytes. Loops and conditionals are read through, the latter by their longest
    branch.
    """

    def __init__(self, hlo: str, accelerator: Accelerator, load: EvenLoad | None = None) -> None:
        """Reads a scheduled module in HLO text form."""
        self._bodies = computations(hlo)
        self._runs = executions(self._bodies, hlo)
        self._accelerator, self._load = accelerator, load or EvenLoad()
        self._played: dict[str, _Played] = {}
        self._lines: dict[str, list[_Instruction]] = {}

    def transfers(self) -> dict[tuple[str, int], Transfers]:
        """Returns all transfers, by kind and group size of their collectives.

        What a loop without a known number of passes does is counted once.
        """
        found: dict[tuple[str, int], Transfers] = defaultdict(Transfers)
        for name, runs in self._runs.items():
            for key, transfers in self._play(name).transfers.items() if runs else ():
                found[key].seconds += runs * transfers.seconds
                found[key].exposed += runs * transfers.exposed
        return dict(found)

    def timeline(self, scope: str) -> list[Span]:
        """Returns one pass of the loop in a named scope, with all passes of the loops inside; nothing without one."""
        for name in self._bodies:
            for instruction in self._instructions(name) if self._runs[name] else ():
                called = _CALLED.search(instruction.rest)
                if instruction.opcode == "while" and f'/{scope}/while"' in instruction.rest and called:
                    return _merged(self._expanded(called[1], 0.0, "all else"))
        return []

    def _expanded(self, name: str, start: float, part: str) -> Iterator[Span]:
        """Yields what a computation does; without a name of its own it belongs to the part around it."""
        played = self._play(name)
        for span in played.spans:
            what = span.what or part
            yield dataclasses.replace(span, what=what, start=start + span.start, end=start + span.end)
        for body, begin, count, what in played.loops:
            for index in range(count):
                yield from self._expanded(body, start + begin + index * self._play(body).seconds, what or part)

    def _play(self, name: str) -> _Played:
        """Returns how a computation runs."""
        if name in self._played:
            return self._played[name]
        played = self._played[name] = _Played()
        now, free = 0.0, defaultdict[str, float](float)
        pending: dict[str, tuple[tuple[str, int], float]] = {}
        named = {instruction.name: instruction for instruction in self._instructions(name)}
        for instruction in named.values():
            sent = sent_by(instruction.line, self._bodies[name]) if instruction.opcode.startswith(KINDS) else None
            if sent is not None:
                kind, group, size = sent
                if group == 1:
                    continue
                lane, seconds = self._transfer(instruction, kind, size)
                begin = max(now, free[lane])
                free[lane] = begin + seconds
                played.spans.append(Span(lane, _part(instruction), begin, free[lane]))
                played.transfers[kind, group].seconds += seconds
                pending[instruction.name] = (kind, group), free[lane]
            done = pending.pop(self._awaited(instruction), None)
            if done is not None:
                key, end = done
                played.transfers[key].exposed += max(end - now, 0.0)
                now = max(end, now)
            elif sent is None and (seconds := self._seconds(instruction, named)):
                called = _CALLED.search(instruction.rest)
                if instruction.opcode == "while" and called:
                    played.loops.append((called[1], now, passes(instruction.line, self._bodies), _part(instruction)))
                else:
                    played.spans.append(Span("computation", _part(instruction), now, now + seconds))
                now += seconds
        played.seconds = now
        return played

    @staticmethod
    def _awaited(instruction: _Instruction) -> str:
        """Returns the name of the collective that an instruction waits for; its own if it is synchronous."""
        if instruction.opcode.endswith("-done") and instruction.operands:
            return instruction.operands[0]
        return instruction.name if instruction.opcode in KINDS else ""

    def _transfer(self, instruction: _Instruction, kind: str, size: float) -> tuple[str, float]:
        """Returns the links that a collective uses, and its seconds."""
        listed, node = _FIRST_GROUP.search(instruction.rest), self._accelerator.node
        first, second = (int(rank) for rank in listed.groups()) if listed else (0, node)
        if kind == "ragged-all-to-all":
            size *= dict(self._load.hops).get(second - first, 1.0)
        if first // node != second // node:
            return "between nodes", size / self._accelerator.outer_link
        return "within a node", size / self._accelerator.inner_link

    def _instructions(self, name: str) -> list[_Instruction]:
        if name not in self._lines:
            lines = self._bodies.get(name, "").splitlines()
            self._lines[name] = [_Instruction(match, line) for line in lines if (match := _LINE.match(line))]
        return self._lines[name]

    def _seconds(self, instruction: _Instruction, named: dict[str, _Instruction]) -> float:
        if instruction.opcode in _FREE or instruction.opcode.endswith(("-start", "-done")):
            return 0.0
        called = _CALLED.search(instruction.rest)
        if instruction.opcode == "while" and called:
            return passes(instruction.line, self._bodies) * self._play(called[1]).seconds
        if instruction.opcode == "call" and called:
            return self._play(called[1]).seconds
        if instruction.opcode == "conditional":
            branches = re.findall(r"[\w.\-]+", " ".join(map(" ".join, _BRANCHES.findall(instruction.rest))))
            return max((self._play(branch).seconds for branch in branches if branch in self._bodies), default=0.0)
        operands = [named[operand] for operand in instruction.operands if operand in named]
        inner = self._instructions(called[1]) if instruction.opcode == "fusion" and called else []
        moved = _fused_bytes(operands, instruction, inner) if inner else sum(x.bytes for x in (*operands, instruction))
        product = next((x for x in (instruction, *inner) if _is_product(x)), None)
        seconds = moved / (self._accelerator.bandwidth * self._accelerator.bandwidth_reached)
        if product is None:
            return seconds
        known = named if product is instruction else {x.name: x for x in inner}
        factors = [known[operand] for operand in product.operands if operand in known]
        arrays = [array for factor in factors for array in factor.arrays]
        if product.opcode == "dot":
            operations = _dot_operations(product, factors[0])
        else:
            operations = _kernel_operations([*arrays, *product.arrays])
        accelerator = self._accelerator
        fp8 = sum(dtype.startswith("f8") for dtype, _ in arrays) >= 2
        rate = accelerator.fp8_flops * accelerator.fp8_reached if fp8 else accelerator.flops * accelerator.flops_reached
        kernel = _KERNEL.search(product.rest)
        filled = self._load.products if kernel and "grouped" in kernel[1] else 1.0
        return max(seconds, operations / rate) * filled


def _part(instruction: _Instruction) -> str:
    """Returns the part of a layer to which an instruction belongs, by its named scopes; nothing where they say none."""
    scopes = _SCOPES.search(instruction.rest)
    text = scopes[1] if scopes else ""
    part = next((part for part in ("routed_experts", "attention") if part in text), None)
    return f"{part.replace('_', ' ')}, {'backward' if 'transpose(' in text else 'forward'}" if part else ""


def _merged(spans: Iterable[Span]) -> list[Span]:
    """Returns spans in order of their lanes and starts, those that follow another of the same part joined with it."""
    joined: list[Span] = []
    for span in sorted(spans, key=lambda span: (span.lane, span.start)):
        last = joined[-1] if joined else None
        if last and (last.lane, last.what) == (span.lane, span.what) and span.start <= last.end * (1 + 1e-9):
            joined[-1] = dataclasses.replace(last, end=max(last.end, span.end))
        else:
            joined.append(span)
    return joined


def _is_product(instruction: _Instruction) -> bool:
    """Whether an instruction is a matrix product: a dot, or a kernel whose name says so."""
    if instruction.opcode != "custom-call":
        return instruction.opcode == "dot"
    kernel = _KERNEL.search(instruction.rest)
    return "gemm" in instruction.rest[:200] or bool(kernel and "matmul" in kernel[1])


def _dot_operations(dot: _Instruction, left: _Instruction) -> float:
    """Returns 2 M N K of a dot, from its result and the contracted dimensions of its left operand."""
    sizes = [[int(size) for size in text.split(",") if size] for (_, text), *_ in (left.arrays, dot.arrays)]
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.rest)
    inner = [sizes[0][int(axis)] for axis in contracted[1].split(",") if axis] if contracted else []
    return 2.0 * math.prod(sizes[1]) * math.prod(inner)


def _kernel_operations(arrays: Sequence[tuple[str, str]]) -> float:
    """Returns 2 M N K of a kernel, from the sizes M K, N K and M N of the largest three of its operands and results.

    A leading axis of one or of all is that of the experts, and each row meets one of its parts. One of two is that of
    parts of the rows, which are added up for each of the experts, the leading axis of the third.
    """
    shapes = sorted(([int(size) for size in text.split(",") if size] for _, text in arrays), key=math.prod)[-3:]
    leading = Counter(shape[0] for shape in shapes if len(shape) > 2)
    experts = math.prod(size for size, count in leading.items() if count % 2)
    return 2 * math.sqrt(math.prod(map(math.prod, shapes)) / experts)


def _fused_bytes(operands: Sequence[_Instruction], fusion: _Instruction, inner: Sequence[_Instruction]) -> float:
    """Returns the bytes that a fusion reads and writes; of a buffer of which it handles a slice, those of the slice."""
    users: dict[str, list[_Instruction]] = defaultdict(list)
    for instruction in inner:
        for operand in instruction.operands:
            users[operand].append(instruction)
    known = {instruction.name: instruction for instruction in inner}
    read = written = 0.0
    parameters = [instruction for instruction in inner if instruction.opcode == "parameter"]
    parameters.sort(key=lambda instruction: int(re.search(r"parameter\((\d+)\)", instruction.line)[1]))  # pyright: ignore[reportOptionalSubscript]
    for parameter, operand in zip(parameters, operands, strict=False):
        uses = [user for user in users[parameter.name] if not _updates(user, parameter)]
        if uses and all(user.opcode in _SLICES and user.operands[0] == parameter.name for user in uses):
            read += sum(user.bytes for user in uses)
        elif uses:
            read += operand.bytes
    updates = [known[x.operands[1]] for x in inner if x.opcode == "dynamic-update-slice" and x.operands[1] in known]
    written = sum(update.bytes for update in updates) if updates else fusion.bytes
    return read + written


def _updates(user: _Instruction, parameter: _Instruction) -> bool:
    """Whether an instruction writes a slice of the parameter."""
    return user.opcode == "dynamic-update-slice" and user.operands[:1] == [parameter.name]
