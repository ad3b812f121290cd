"""Counters, gauges and histograms of a server, in Prometheus' text format."""

from __future__ import annotations

import bisect
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator

import numpy as np

from dsv3_jax.inference import Engine

_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # seconds
_WINDOW = 10.0  # seconds over which tokens per second are averaged
_LOAD_EVERY = 1.0  # seconds between two looks at the load of the experts, which is kept on the device


class Histogram:
    """Counts durations in seconds by upper bounds."""

    def __init__(self) -> None:
        self._counts = [0] * (len(_BOUNDS) + 1)
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        """Counts one duration."""
        self._counts[bisect.bisect_left(_BOUNDS, seconds)] += 1
        self._sum += seconds

    def lines(self, name: str) -> Iterator[str]:
        """Yields the lines of the histogram."""
        total = 0
        for bound, count in zip((*_BOUNDS, "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum}"
        yield f"{name}_count {total}"


class Metrics:
    """What a server measures. It may be used from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ends: Counter[str] = Counter()
        self._first_token = Histogram()
        self._duration = Histogram()
        self._written: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])
        self._engine: dict[str, int] = {}
        self._sets: dict[str, dict[str, int]] = {}
        self._drafts: tuple[list[int], list[int]] = ([], [])
        self._load = np.zeros((0, 0), np.int64)
        self._load_at = 0.0

    def record_engine(self, engine: Engine) -> None:
        """Records the state of the engine, between two of its steps."""
        done, now = engine.statistics, time.monotonic()
        load = engine.expert_load if now - self._load_at > _LOAD_EVERY or not engine.has_work else None
        with self._lock:
            if load is not None:
                self._load, self._load_at = load, now
            self._engine = {
                "dsv3_requests_running": engine.running,
                "dsv3_requests_waiting": engine.waiting,
                "dsv3_pages": engine.sizes.pages,
                "dsv3_pages_free": engine.free_pages,
                "dsv3_prompt_tokens_total": done.read_tokens,
                "dsv3_reused_prompt_tokens_total": done.reused_tokens,
                "dsv3_written_tokens_total": done.written_tokens,
                "dsv3_preemptions_total": done.preemptions,
            }
            self._sets = _of_sets(engine)
            self._drafts = list(done.drafted), list(done.accepted)
            self._written.append((now, done.written_tokens))
            while self._written[0][0] < now - _WINDOW:
                self._written.popleft()

    def record_end(self, how: str, seconds: float) -> None:
        """Counts a request that took so many seconds and ended so: its finish reason, or why it failed."""
        with self._lock:
            self._ends[how] += 1
            self._duration.add(seconds)

    def record_first_token(self, seconds: float) -> None:
        """Records the time from a request's arrival to its first token."""
        with self._lock:
            self._first_token.add(seconds)

    def text(self) -> str:
        """Returns all metrics in Prometheus' text format."""
        with self._lock:
            return "\n".join([*self._lines(), ""])

    def _lines(self) -> Iterator[str]:
        for name, value in self._engine.items():
            yield from _metric(name, [("", value)])
        for name, values in self._sets.items():
            yield from _metric(name, [(f'{{set="{devices}"}}', value) for devices, value in values.items()])
        (start, before), (end, after) = self._written[0], self._written[-1]
        # Without steps in the last seconds nothing was written in them.
        rate = 0.0 if time.monotonic() - end > _WINDOW or end <= start else (after - before) / (end - start)
        yield from _metric("dsv3_tokens_per_second", [("", rate)])
        for name, counts in zip(("drafted", "accepted"), self._drafts, strict=True):
            rows = [(f'{{position="{position}"}}', count) for position, count in enumerate(counts, start=1)]
            yield from _metric(f"dsv3_{name}_tokens_total", rows)
        yield from _metric(
            "dsv3_expert_tokens_total",
            [
                (f'{{layer="{layer}",expert="{expert}"}}', int(count))
                for layer, counts in enumerate(self._load)
                for expert, count in enumerate(counts)
            ],
        )
        yield from _metric("dsv3_requests_total", [(f'{{end="{how}"}}', n) for how, n in sorted(self._ends.items())])
        for name, histogram in (("first_token", self._first_token), ("request", self._duration)):
            yield f"# TYPE dsv3_{name}_seconds histogram"
            yield from histogram.lines(f"dsv3_{name}_seconds")


def _of_sets(engine: Engine) -> dict[str, dict[str, int]]:
    """Returns the requests and pages of the prefill set and the decode set; nothing where the same devices do both.

    A prompt that has been read waits for the decode set until its entries have arrived there.
    """
    if engine.prefill is None:
        return {}
    prefill, decode = engine.schedulers
    reading = sum(sequence.is_reading for sequence in prefill.running)
    arriving = sum(sequence.is_reading for sequence in decode.running)
    return {
        "dsv3_set_requests_waiting": {
            "prefill": engine.waiting,
            "decode": len(prefill.running) - reading + arriving,
        },
        "dsv3_set_requests_running": {"prefill": reading, "decode": len(decode.running) - arriving},
        "dsv3_set_pages": {"prefill": prefill.allocator.count, "decode": decode.allocator.count},
        "dsv3_set_pages_free": {"prefill": prefill.allocator.available, "decode": decode.allocator.available},
    }


def _metric(name: str, rows: Iterable[tuple[str, float]]) -> Iterator[str]:
    yield f"# TYPE {name} {'counter' if name.endswith('_total') else 'gauge'}"
    for labels, value in rows:
        yield f"{name}{labels} {value}"
