"""Measures the engine: 64 requests of mixed lengths against transformers, 16 sequences against one, drafts, bandwidth.

    python experiments/benchmarks/serving.py --oracle-python .venv-oracle/bin/python

Both libraries run as in `vs_transformers.py`: in processes of their own, one at a time, in alternating rounds. The
requests arrive at once; transformers' `generate` reads them in batches of 16, padded. Figures to go by are ratios of
times in the same round. Writes serving.json and serving.md into experiments/results/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

import numpy as np
from vs_transformers import Contender, Worker, parse, processor, published, race

from dsv3_jax import ModelConfig

REQUESTS, SLOTS, CONTEXT = 64, 16, 256
REPORTED_ACCEPTANCE = 0.85  # of the second token, section 5.4.3 of the report: 85 % to 90 %


def mixed(config: ModelConfig) -> dict[str, Any]:
    """Returns 64 requests: prompts of 8 to 128 tokens, 8 to 96 new tokens, equally likely on a logarithmic scale."""
    random = np.random.default_rng(0)
    prompts, new = (np.exp(random.uniform(np.log(8), np.log(most), REQUESTS)).astype(int) for most in (128, 96))
    return {"prompts": prompts.tolist(), "new_tokens": new.tolist(), "config": config.to_dict()}


def equal(config: ModelConfig, sequences: int) -> dict[str, Any]:
    """Returns requests of 32 tokens that get 96 more."""
    return {"prompts": [32] * sequences, "new_tokens": [96] * sequences, "config": config.to_dict()}


def bytes_per_token(config: ModelConfig) -> int:
    """Returns the bytes of float32 weights that one token is multiplied by; of the embedding it reads one row."""
    return 4 * (config.num_active_parameters() - config.vocab_size * config.hidden_size)


def copy_rate() -> float:
    """Returns the bytes per second that this machine reads while it copies 256 MB, the best of ten."""
    source = np.ones(1 << 26, np.float32)
    target = np.empty_like(source)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - start)
    return source.nbytes / min(seconds)


def measure(preset: str, ours: Worker, theirs: Worker, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the times of all contenders at one size, per run."""
    plain = ModelConfig.preset(preset, num_nextn_predict_layers=0)
    drafting = ModelConfig.preset(preset, num_nextn_predict_layers=1)
    shared = {"task": "serve", "dtype": options.dtype, "context": CONTEXT, "engine": {"max_sequences": SLOTS}}
    one = {"engine": {"max_sequences": 1, "steps": 32}}
    in_int8 = {"max_sequences": SLOTS, "int8_weights": True}
    requests = {
        "64 requests": mixed(plain),
        "64 requests, int8": mixed(plain) | {"engine": in_int8},
        "16 sequences": equal(plain, SLOTS),
        "1 sequence": equal(plain, 1) | one,
        "1 sequence, int8": equal(plain, 1) | {"engine": one["engine"] | {"int8_weights": True}},
        "1 sequence, one draft": equal(drafting, 1) | {"engine": one["engine"] | {"drafts": 1}},
    }
    contenders = {name: Contender(ours, shared | request) for name, request in requests.items()}
    for name in ("64 requests", "1 sequence"):
        request = requests[name] | {"config": published(plain), "batch": SLOTS}
        contenders[f"{name}, transformers"] = Contender(theirs, {"task": "serve", "dtype": options.dtype} | request)
    results = race(contenders, options.rounds, options.repeats)
    for name, result in results.items():
        result["tokens_per_second"] = (
            sum(requests[name.removesuffix(", transformers")]["new_tokens"]) / result["seconds"]
        )
    return results


def ratio(results: dict[str, Any], slow: str, fast: str) -> float:
    """Returns how many times as long the first takes as the second: the median over rounds."""
    pairs = zip(results[slow]["round_seconds"], results[fast]["round_seconds"], strict=True)
    return statistics.median(a / b for a, b in pairs)


def summary(preset: str, results: dict[str, Any], copied: float) -> dict[str, float]:
    """Returns the figures that the table shows."""
    tokens = results["1 sequence"]["tokens_per_second"]
    # A random model accepts no draft: a step with one then costs what it costs, and gives one token.
    step = ratio(results, "1 sequence", "1 sequence, one draft")
    bandwidth = bytes_per_token(ModelConfig.preset(preset, num_nextn_predict_layers=0)) * tokens
    return {
        "times transformers, 64 requests": ratio(results, "64 requests, transformers", "64 requests"),
        "times transformers, 64 requests, int8": ratio(results, "64 requests, transformers", "64 requests, int8"),
        "times transformers, 1 sequence": ratio(results, "1 sequence, transformers", "1 sequence"),
        "times transformers, 1 sequence, int8": ratio(results, "1 sequence, transformers", "1 sequence, int8"),
        "16 sequences over 1": SLOTS * ratio(results, "1 sequence", "16 sequences"),
        "gain of a draft at 85 % acceptance": (1 + REPORTED_ACCEPTANCE) * step,
        "mean seconds to the first token, 64 requests": results["64 requests"]["value"],
        "share of the copy rate, 1 sequence": bandwidth / copied,
    }


def markdown(report: dict[str, Any]) -> str:
    """Returns the report as Markdown tables."""
    about = report["about"]
    presets = list(report["summary"])
    lines = [
        "# Serving",
        "",
        f"{about['cpu']}, {about['threads']} threads, {about['dtype']} unless int8 is said; jax {about['jax']}, torch "
        f"{about['torch']}, transformers {about['transformers']}. Medians of {about['rounds']} alternating rounds on a "
        "machine that others used at the same time: go by the ratios. Models are random; the gain of a draft is the "
        "measured cost of a step with one at the acceptance that the report measured. Written by "
        "`experiments/benchmarks/serving.py`.",
        "",
        "| tokens per second | " + " | ".join(presets) + " |",
        "|---" * (1 + len(presets)) + "|",
    ]
    for name in report["results"][presets[0]]:
        rates = [f"{report['results'][preset][name]['tokens_per_second']:,.0f}" for preset in presets]
        lines.append(f"| {name} | " + " | ".join(rates) + " |")
    lines += ["", "| | " + " | ".join(presets) + " |", "|---" * (1 + len(presets)) + "|"]
    for name in report["summary"][presets[0]]:
        lines.append(f"| {name} | " + " | ".join(f"{report['summary'][p][name]:.2f}" for p in presets) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    options = parse()
    copied = copy_rate()
    ours = Worker(sys.executable, "jax_side.py", options.threads)
    theirs = Worker(options.oracle_python, "transformers_side.py", options.threads)
    try:
        about = {"cpu": processor(), "copied_bytes_per_second": copied}
        about |= {name: getattr(options, name) for name in ("threads", "dtype", "rounds", "repeats")}
        report: dict[str, Any] = {"about": about | ours.ask(do="versions") | theirs.ask(do="versions")}
        report["results"] = {preset: measure(preset, ours, theirs, options) for preset in options.presets}
    finally:
        ours.close()
        theirs.close()
    report["summary"] = {preset: summary(preset, results, copied) for preset, results in report["results"].items()}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "serving.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / "serving.md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
