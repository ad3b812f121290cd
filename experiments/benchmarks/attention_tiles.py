"""Compares attention as one loop over tiles with attention in unrolled chunks of queries, for long sequences.

    python experiments/benchmarks/attention_tiles.py [--lengths 2048 4096] [--heads 8] [--rounds 7]

The unrolled form is the usual one in plain JAX: each chunk of 512 queries attends to all keys up to its end, and is
recomputed in the backward pass. Both forms compute the same tiles of logits. Each is measured in three uses: the
forward pass, forward and backward pass, and the same in a layer that is recomputed but has kept the attention output
(the report's recomputation; the tiled form then repeats its forward loop for the logarithms of the sums). For each
use the script measures seconds (medians of alternating calls in one process), seconds to compile, the memory that the
compiled program needs beyond its arguments and results, and the length of the program. Writes attention_tiles.json
into experiments/results/.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dsv3_jax.modules.attention_core import causal_attention
from dsv3_jax.modules.rematerialisation import rematerialise
from dsv3_jax.precision.keeping import keep

RESULTS = Path(__file__).resolve().parents[1] / "results"
QUERY_KEY, VALUE = 192, 128  # head dimensions of the 671B model
SCALE = QUERY_KEY**-0.5
CHUNK = 512  # queries


def unrolled(
    q: Float[Array, "B T H qk"], k: Float[Array, "B T H qk"], v: Float[Array, "B T H v"]
) -> Float[Array, "B T H v"]:
    """Causal attention in chunks of queries, one after another in the program."""

    @functools.partial(jax.checkpoint, static_argnums=(3,))
    def attend(q: Array, k: Array, v: Array, start: int) -> Array:
        logits = SCALE * jnp.einsum("bqhc,bshc->bhqs", q, k, preferred_element_type=jnp.float32)
        visible = start + jnp.arange(q.shape[1])[:, None] >= jnp.arange(k.shape[1])[None]
        weights = jax.nn.softmax(jnp.where(visible, logits, -jnp.inf), axis=-1)
        return jnp.einsum("bhqs,bshv->bqhv", weights.astype(v.dtype), v)

    starts = range(0, q.shape[1], CHUNK)
    parts = [attend(q[:, at : at + CHUNK], k[:, : at + CHUNK], v[:, : at + CHUNK], at) for at in starts]
    return jnp.concatenate(parts, axis=1)


FORMS: dict[str, Callable[..., Array]] = {
    "unrolled": unrolled,
    "tiled": functools.partial(causal_attention, scale=SCALE),
}


def with_gradients(form: Callable[..., Array]) -> Callable[..., Any]:
    """Returns a function that computes the output and, for a given gradient of it, the gradients of q, k and v."""

    def both(q: Array, k: Array, v: Array, do: Array) -> Any:
        out, back = jax.vjp(form, q, k, v)
        return out, back(do)

    return both


def recomputed(form: Callable[..., Array]) -> Callable[..., Any]:
    """Returns `with_gradients` of a layer that is recomputed in the backward pass but keeps the output of attention."""
    return with_gradients(rematerialise(lambda q, k, v: keep(form(q, k, v)), "report"))


KINDS: dict[str, Callable[..., Any]] = {
    "forward": lambda form: lambda q, k, v, do: form(q, k, v),
    "forward and backward": with_gradients,
    "recomputed": recomputed,
}


def measure(length: int, heads: int, rounds: int) -> dict[str, Any]:
    """Measures both forms at one sequence length in every use, and checks that their results agree."""
    shapes = [(1, length, heads, width) for width in (QUERY_KEY, QUERY_KEY, VALUE, VALUE)]
    arrays = [jax.random.normal(key, s) for key, s in zip(jax.random.split(jax.random.key(0), 4), shapes, strict=True)]
    found: dict[str, Any] = {}
    for kind, use in KINDS.items():
        compiled, figures = {}, {}
        for name, form in FORMS.items():
            compiled[name], figures[name] = _compile(use(form), *arrays)
        results = [jax.tree.leaves(run(*arrays)) for run in compiled.values()]
        for a, b in zip(*results, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)
        seconds: dict[str, list[float]] = {name: [] for name in FORMS}
        for _ in range(rounds):
            for name, run in compiled.items():
                start = time.perf_counter()
                jax.block_until_ready(run(*arrays))
                seconds[name].append(time.perf_counter() - start)
        for name, times in seconds.items():
            figures[name]["seconds"] = round(statistics.median(times), 4)
        pairs = zip(*seconds.values(), strict=True)
        figures["tiled over unrolled, seconds"] = round(statistics.median(b / a for a, b in pairs), 3)
        found[kind] = figures
    return found


def _compile(function: Callable[..., Any], *arguments: Array) -> tuple[Any, dict[str, Any]]:
    """Returns the compiled function and the figures of its compilation."""
    lowered = jax.jit(function).lower(*arguments)
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    memory: Any = compiled.memory_analysis()
    return compiled, {
        "seconds_to_compile": round(seconds, 3),
        "temporary_megabytes": round(memory.temp_size_in_bytes / 1e6, 1),
        "lines_of_program": len((compiled.as_text() or "").splitlines()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096], help="sequence lengths")
    parser.add_argument("--heads", type=int, default=8, help="attention heads")
    parser.add_argument("--rounds", type=int, default=7, help="calls of each form")
    arguments = parser.parse_args()
    device = jax.devices()[0]
    result: dict[str, Any] = {
        "device": f"{device.device_kind}, {os.cpu_count()} cores" if device.platform == "cpu" else device.device_kind,
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "load_average_before": round(os.getloadavg()[0], 1),
        "sizes": {"batch": 1, "heads": arguments.heads, "qk": QUERY_KEY, "v": VALUE, "dtype": "float32"},
    }
    for length in arguments.lengths:
        result[str(length)] = found = measure(length, arguments.heads, arguments.rounds)
        for kind, figures in found.items():
            for name in FORMS:
                print(f"{length:6d} {kind:21s} {name:9s} {figures[name]}")
            print(f"{length:6d} {kind:21s} tiled takes {figures['tiled over unrolled, seconds']:.2f} times as long")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "attention_tiles.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
