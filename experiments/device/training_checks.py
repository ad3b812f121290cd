"""Trains a preset on random tokens and reports tokens per second, MFU, memory, and the kernels that took longest."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from cases import Case, device_lock, note

from dsv3_jax.counts import count_flops
from dsv3_jax.runs.checkpoints import abstract_state, make_model
from dsv3_jax.runs.hardware import peak_flops
from dsv3_jax.runs.step_inputs import step_settings
from dsv3_jax.training.config import RunConfig
from dsv3_jax.training.defaults import default_run
from dsv3_jax.training.state import new_state
from dsv3_jax.training.step import make_train_step

STEPS = 20
PROFILED = 15  # kernels that the report names


def cases(tiny: bool, precision: str, batch: int, micro_batch: int, rematerialisation: str) -> Iterator[Case]:
    config = run_config("tiny" if tiny else "1b", precision, batch, micro_batch, rematerialisation)
    yield Case(f"{config.preset} in {precision}, {batch} x {config.data.sequence_length}", lambda: train(config, tiny))


def run_config(preset: str, precision: str, batch: int, micro_batch: int, rematerialisation: str) -> RunConfig:
    default = default_run(preset)
    changes = {"batch_size": batch, "micro_batch_size": micro_batch, "rematerialisation": rematerialisation}
    return dataclasses.replace(
        default, precision=precision, training=dataclasses.replace(default.training, steps=1000, **changes)
    )


def train(config: RunConfig, tiny: bool) -> dict[str, Any]:
    """Returns what the case reports. It passes if every loss is finite and close to that of guessing."""
    skeleton, shapes = abstract_state(config, functools.partial(make_model, config))
    training, length = config.training, config.data.sequence_length
    rng = np.random.default_rng(0)
    shape = (training.batch_size // training.rows_per_pass, training.rows_per_pass, length + 1)
    batches = [jax.device_put(rng.integers(0, config.model.vocab_size, shape, "i4")) for _ in range(4)]
    segments = jax.device_put(np.ones(shape, "i4"))
    settings = step_settings(training.schedule.at(0.01, training.batch_size, training.rows_per_pass))
    start = time.perf_counter()
    lowered = make_train_step(skeleton, config).lower(shapes, batches[0], segments, settings)
    note(lowered_s=round(time.perf_counter() - start, 1))
    step = lowered.compile()
    outcome: dict[str, Any] = {"compile_s": round(time.perf_counter() - start, 1)}
    note(**outcome)
    with device_lock():
        state = new_state(make_model(config), config)[1]
        return outcome | run(config, step, state, batches, segments, settings, tiny)


def run(
    config: RunConfig, step: Any, state: Any, batches: Any, segments: Any, settings: Any, tiny: bool
) -> dict[str, Any]:
    """Runs the steps; returns what the case reports of them."""
    training, length = config.training, config.data.sequence_length
    losses, seconds = [], []
    for i in range(STEPS if not tiny else 3):
        start = time.perf_counter()
        state, metrics = step(state, batches[i % len(batches)], segments, settings)
        losses.append(float(metrics.main_loss))
        seconds.append(time.perf_counter() - start)
        note(step=i, loss=losses[-1], step_s=seconds[-1])
    median = statistics.median(seconds[2:])
    tokens = training.batch_size * length
    operations = count_flops(config.model, length).training_with_mtp * tokens
    guessing = math.log(config.model.vocab_size)
    outcome: dict[str, Any] = {
        "passed": bool(np.isfinite(losses).all() and abs(losses[0] - guessing) < 0.3 and losses[-1] < guessing + 0.3),
        "tokens_per_s": round(tokens / median), "step_s": median, "first_loss": losses[0], "last_loss": losses[-1],
        "spread": (max(seconds[2:]) - min(seconds[2:])) / median,
    }  # fmt: skip
    device = jax.devices()[0]
    if peak := peak_flops(device):
        outcome["mfu"] = operations / median / peak
    if statistics_of := device.memory_stats():
        outcome["peak_gb"] = statistics_of["peak_bytes_in_use"] / 1e9
    try:
        outcome["profile"] = profile(lambda: step(state, batches[0], segments, settings))
    except Exception as error:  # the measurement above is worth more than its explanation
        outcome["profile"] = [f"{type(error).__name__}: {error}"[:200]]
    return outcome


def profile(run: Any) -> list[str]:
    """Returns the kernels that took longest in one run, with their milliseconds and number of launches."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (file,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
    spent: dict[str, list[float]] = defaultdict(list)
    for plane in data.planes:
        if "GPU" not in plane.name:
            continue
        for line in plane.lines:
            if line.name.startswith("Stream"):
                for event in line.events:
                    spent[event.name].append(event.duration_ns * 1e-6)
    longest = sorted(spent, key=lambda name: -sum(spent[name]))
    total = sum(map(sum, spent.values()))
    top = [f"{sum(spent[name]):.2f} ms, {len(spent[name])} x {name[:60]}" for name in longest[:PROFILED]]
    return [f"{total:.1f} ms in all", *top]
