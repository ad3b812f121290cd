"""Runs the cases of one check and prints one JSON line when each starts and one with its outcome.

    python worker.py '{"module": "dense_checks", "arguments": {"form": "ragged"}}'

The parent, `run.py`, starts it. Lines go to the original standard output; what the cases print goes to standard error.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
from cases import device_lock, listeners


def main() -> int:
    request = json.loads(sys.argv[1])
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def report(**line: Any) -> None:
        lines.write(json.dumps(line, default=float) + "\n")

    listeners.append(lambda what, **numbers: report(kind=what, **numbers))
    with contextlib.ExitStack() as stack:
        if request.get("interpret"):
            stack.enter_context(interpreted_kernels())
        if request.get("no_clusters"):
            without_clusters()
        cases = importlib.import_module(request["module"]).cases
        only, skip = request.get("only"), set(request.get("skip", ()))
        for case in cases(tiny=bool(request.get("tiny")), **request.get("arguments", {})):
            if case.name in skip or (only is not None and case.name not in only):
                continue
            report(kind="started", case=case.name)
            start = time.perf_counter()
            try:
                with contextlib.nullcontext() if request["timed"] else device_lock(shared=True):
                    outcome = case.run()
            except Exception as error:
                traceback.print_exc()
                outcome = {"passed": False, "message": f"{type(error).__name__}: {str(error).strip()[:300]}"}
            if not math.isfinite(outcome.get("error", 0)):
                outcome["passed"] = False
            outcome = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in outcome.items()}
            report(kind="result", case=case.name, seconds=round(time.perf_counter() - start, 2), **outcome)
            if "message" in outcome and not device_works():
                return 3  # An illegal address ends every later call of the process: the parent starts another.
    return 0


def device_works() -> bool:
    try:
        return bool(jax.block_until_ready(jax.numpy.arange(4) + 1)[3] == 4)
    except Exception:
        return False


def without_clusters() -> None:
    """Leaves only tilings without clusters to those that a product may choose."""
    for name, function in (("blockwise_matmul.tuning", "tilings"), ("grouped_matmul.tiling", "candidates")):
        module = importlib.import_module(f"pallas_kernels.{name}")
        setattr(module, function, functools.partial(_without_clusters, getattr(module, function)))
        module.TUNED.clear()


def _without_clusters(candidates: Callable[..., tuple], *arguments: Any, **options: Any) -> tuple:
    return tuple(tiling for tiling in candidates(*arguments, **options) if tiling.cluster == 1)


INTERPRETED = {
    "quantize.hopper": ("quantize", "quantize_both", "requantize_transposed"),
    "blockwise_matmul.hopper": ("matmul",),
    "grouped_matmul.hopper": ("rows_by_weights", "rows_by_rows", "masked"),
    "latent_attention.hopper_forward": ("forward",),
    "latent_attention.hopper_backward": ("backward",),
    "latent_decode.hopper": ("decode",),
    "rms_norm.hopper": ("quantize_scaled", "rms_norm_gradient"),
    "swiglu.hopper": ("quantize_swiglu", "swiglu_gradient"),
    "routing.hopper_gate": ("gate",),
    "routing.hopper_rows": ("permute", "combine", "combine_gradient"),
}


@contextlib.contextmanager
def interpreted_kernels() -> Iterator[None]:
    """Has the kernels of Hopper run in their interpreter, on a CPU described as two multiprocessors."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    from pallas_kernels.hopper_launch import hopper_target

    jax.config.update("jax_cpu_enable_async_dispatch", False)
    for name, functions in INTERPRETED.items():
        module = importlib.import_module(f"pallas_kernels.{name}")
        for function in functions:
            kernel = getattr(module, function)
            setattr(module, function, functools.partial(kernel, interpret=plgpu.InterpretGPUParams()))
    with hopper_target(2):
        yield


if __name__ == "__main__":
    sys.exit(main())
