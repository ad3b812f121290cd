"""Measures what caches and weights in small formats change: log-probabilities of the next token, against float32.

    python experiments/engine_formats.py --presets nano mini

Models are random: each prompt of 200 random tokens is read, and the log-probabilities of the 20 most likely next tokens
are compared where both list them. Writes engine_formats.json and engine_formats.md into experiments/results/.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3_jax import DeepSeekV3, ModelConfig
from dsv3_jax.inference import Engine, EngineConfig, Request
from dsv3_jax.modules.paged_cache import bytes_per_token

PROMPTS, LENGTH = 32, 200
FORMATS: dict[str, dict[str, Any]] = {
    "cache in bfloat16": {"cache_dtype": "bfloat16"},
    "cache in FP8, a scale for each token": {"cache_dtype": "float8_e4m3fn"},
    "weights in int8, a scale for each channel": {"int8_weights": True},
}


def next_tokens(model: DeepSeekV3, **changes: Any) -> list[dict[int, float]]:
    """Returns the log-probabilities of the most likely next tokens of every prompt."""
    config = EngineConfig(context=256, drafts=0, steps=1, compile_at_start=False, reuse_prefixes=False, **changes)
    random = np.random.default_rng(0)
    prompts = random.integers(0, model.config.vocab_size, (PROMPTS, LENGTH)).tolist()
    requests = [Request(prompt=tuple(prompt), max_new_tokens=1, top_logprobs=20) for prompt in prompts]
    return [dict(result.logprobs[0].top) for result in Engine(model, config).run(requests)]


def compare(preset: str) -> dict[str, Any]:
    """Returns the errors of every format and the bytes of a token in the cache."""
    config = ModelConfig.preset(preset, num_nextn_predict_layers=0)
    model = nnx.jit(lambda rngs: DeepSeekV3(config, rngs=rngs))(nnx.Rngs(0))
    want = next_tokens(model)
    results = {}
    for name, changes in FORMATS.items():
        pairs = zip(next_tokens(model, **changes), want, strict=True)
        errors = [got[token] - value for got, row in pairs for token, value in row.items() if token in got]
        size = bytes_per_token(config, jnp.dtype(changes.get("cache_dtype", "float32")), mtp=False)
        results[name] = {
            "compared": len(errors),
            "rms": float(np.sqrt(np.mean(np.square(errors)))),
            "largest": float(np.max(np.abs(errors))),
            "cache_bytes_per_token": size,
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["nano", "mini"], help="sizes of the model")
    results = {preset: compare(preset) for preset in parser.parse_args().presets}
    out = Path(__file__).parent / "results"
    (out / "engine_formats.json").write_text(json.dumps(results, indent=1) + "\n")
    lines = [
        "# Small formats in the engine",
        "",
        "Errors of log-probabilities (nats) against float32. Written by `experiments/engine_formats.py`.",
        "",
        "| size | format | rms error | largest | bytes per token in the cache |",
        "|---|---|---|---|---|",
    ]
    for preset, formats in results.items():
        lines += [
            f"| {preset} | {name} | {row['rms']:.1e} | {row['largest']:.1e} | {row['cache_bytes_per_token']:,} |"
            for name, row in formats.items()
        ]
    (out / "engine_formats.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
