"""Measures the engine: 64 requests of mixed lengths against transformers, 16 sequences against one, drafts, bandwidth.

    python experiments/benchmarks/serving.py --oracle-python .venv-oracle/bin/python --run runs/nano

Both libraries run as in `vs_transformers.py`: in processes of their own, one at a time, in alternating rounds. The
requests arrive at once; transformers' `generate` reads them in batches of 16, padded, in the order of arrival. Figures
to go by are ratios of times in the same round. A random model accepts no drafts: what a draft gains is measured with a
trained run, and computed for the acceptance that the report measured. Writes benchmark.json and benchmark.md into
experiments/results/serving/.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from vs_transformers import HERE, Contender, Worker, published, race

from dsv3_jax import ModelConfig
from dsv3_jax.operating_system import processor_name

REQUESTS, SLOTS, CONTEXT, STEPS = 64, 16, 256, 16
REPORTED_ACCEPTANCE = 0.85  # of the second token, section 5.4.3 of the report: 85 % to 90 %
WANTED = {
    "times transformers, 64 requests": 5.0,
    "times transformers, 1 sequence": 5.0,
    "times transformers, 1 sequence, int8": 5.0,
    "16 sequences over 1": 6.0,
    "gain of a draft, the trained run": 1.4,
}


def mixed(config: ModelConfig) -> dict[str, Any]:
    """Returns 64 requests: prompts of 8 to 128 tokens, 8 to 96 new tokens, equally likely on a logarithmic scale."""
    random = np.random.default_rng(0)
    prompts, new = (np.exp(random.uniform(np.log(8), np.log(most), REQUESTS)).astype(int) for most in (128, 96))
    return {"prompts": prompts.tolist(), "new_tokens": new.tolist(), "config": config.to_dict()}


def equal(config: ModelConfig, sequences: int) -> dict[str, Any]:
    """Returns requests of 32 tokens that get 96 more."""
    return {"prompts": [32] * sequences, "new_tokens": [96] * sequences, "config": config.to_dict()}


def bytes_of_a_step(config: ModelConfig, tokens: int) -> float:
    """Returns the bytes of float32 weights that so many tokens are multiplied by, if they choose experts at random."""
    per_token = config.num_active_parameters() - config.vocab_size * config.hidden_size  # one row of the embedding
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    experts, chosen = config.n_routed_experts, config.num_experts_per_tok
    more = experts * (1 - (1 - chosen / experts) ** tokens) - chosen
    return 4 * (per_token + config.num_moe_layers * more * expert)


def bytes_of_a_draft(config: ModelConfig) -> float:
    """Returns the bytes of int8 weights, the head's among them, that one MTP module multiplies two tokens by.

    It reads both tokens of the last step, which choose experts at random.
    """
    module = config.num_parameters(mtp=True) - config.num_parameters()
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    experts, chosen = config.n_routed_experts, config.num_experts_per_tok
    unused = experts * (1 - chosen / experts) ** 2
    return module - unused * expert + config.vocab_size * config.hidden_size


def copy_rate(threads: int) -> float:
    """Returns the bytes per second that so many threads read together while they copy 256 MB, the best of ten."""
    source = np.ones((threads, (1 << 26) // threads), np.float32)
    target = np.zeros_like(source)
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(10):
            start = time.perf_counter()
            list(pool.map(np.copyto, target, source))
            seconds.append(time.perf_counter() - start)
    return source.nbytes / min(seconds)


def measure(preset: str, run: Path | None, ours: Worker, theirs: Worker, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the times of all contenders at one size, per run."""
    plain = ModelConfig.preset(preset, num_nextn_predict_layers=0)
    drafting = ModelConfig.preset(preset, num_nextn_predict_layers=1)
    engine = {"max_sequences": SLOTS, "steps": STEPS}  # the same for all, so that they share compiled programs
    requests = {
        "64 requests": mixed(plain),
        "64 requests, int8": mixed(plain) | {"engine": {"int8_weights": True}},
        "16 sequences": equal(plain, SLOTS),
        "1 sequence": equal(plain, 1),
        "1 sequence, int8": equal(plain, 1) | {"engine": {"int8_weights": True}},
        "1 sequence, no draft of its MTP module": equal(drafting, 1) | {"engine": {"drafts": 0}},
        "1 sequence, one draft": equal(drafting, 1) | {"engine": {"drafts": 1}},
    }
    if run is not None:
        few = {"prompts": [24] * 4, "new_tokens": [96] * 4, "run": str(run.resolve())}
        for drafts, name in ((0, "trained run, no drafts"), (1, "trained run, one draft")):
            requests[name] = few | {"engine": {"drafts": drafts, "max_sequences": 1}}
    shared = {"task": "serve", "dtype": options.dtype, "context": CONTEXT}
    contenders = {
        name: Contender(ours, shared | request | {"engine": engine | request.get("engine", {})})
        for name, request in requests.items()
    }
    for name in ("64 requests", "1 sequence"):
        request = requests[name] | {"config": published(plain), "batch": SLOTS}
        contenders[f"{name}, transformers"] = Contender(theirs, {"task": "serve", "dtype": options.dtype} | request)
    results = race(contenders, options.rounds, 1)
    for name, result in results.items():
        tokens = sum(requests[name.removesuffix(", transformers")]["new_tokens"])
        result["tokens_per_second"] = tokens / result["seconds"]
    return results


def ratio(results: dict[str, Any], slow: str, fast: str) -> float:
    """Returns how many times as long the first takes as the second: the median over rounds."""
    pairs = zip(results[slow]["round_seconds"], results[fast]["round_seconds"], strict=True)
    return statistics.median(a / b for a, b in pairs)


def summary(preset: str, results: dict[str, Any], copied: float) -> dict[str, float]:
    """Returns the figures that the table shows."""
    tokens = results["1 sequence"]["tokens_per_second"]
    # A random model accepts no draft: a step with one then costs what it costs, and gives one token.
    step = ratio(results, "1 sequence, no draft of its MTP module", "1 sequence, one draft")
    config = ModelConfig.preset(preset, num_nextn_predict_layers=0)
    weights = bytes_of_a_step(config, 1)
    waits = np.median(np.asarray(results["64 requests"]["values"]), axis=0)
    figures = {
        "times transformers, 64 requests": ratio(results, "64 requests, transformers", "64 requests"),
        "times transformers, 64 requests, int8": ratio(results, "64 requests, transformers", "64 requests, int8"),
        "times transformers, 1 sequence": ratio(results, "1 sequence, transformers", "1 sequence"),
        "times transformers, 1 sequence, int8": ratio(results, "1 sequence, transformers", "1 sequence, int8"),
        "16 sequences over 1": SLOTS * ratio(results, "1 sequence", "16 sequences"),
        "16 sequences over 1, by bytes of weights alone": SLOTS * weights / bytes_of_a_step(config, SLOTS),
        "mean seconds to the first token, 64 requests": float(waits[0]),
        "most seconds to the first token, 64 requests": float(waits[1]),
        "MB of float32 weights per token, 1 sequence": weights / 1e6,
        "share of the copy rate, 1 sequence": weights * tokens / copied,
        "cost of a step with a draft": 1 / step,
        "gain of a draft at 85 % acceptance": (1 + REPORTED_ACCEPTANCE) * step,
        "the same, by bytes of weights alone": (1 + REPORTED_ACCEPTANCE)
        * weights
        / (bytes_of_a_step(config, 2) + bytes_of_a_draft(ModelConfig.preset(preset, num_nextn_predict_layers=1))),
    }
    if "trained run, one draft" in results:
        values = results["trained run, one draft"]["values"]
        figures["acceptance, the trained run"] = statistics.median(value[2] for value in values)
        figures["gain of a draft, the trained run"] = ratio(results, "trained run, no drafts", "trained run, one draft")
    return figures


def markdown(report: dict[str, Any]) -> str:
    """Returns the report as Markdown tables."""
    about = report["about"]
    presets = list(report["summary"])
    wrong = about["continuous_batching"]
    lines = [
        "# Serving",
        "",
        f"{about['cpu']}, {about['threads']} threads, {about['dtype']} unless int8 is said; jax {about['jax']}, torch "
        f"{about['torch']}, transformers {about['transformers']}. Medians of {about['rounds']} alternating rounds. The "
        f"threads copy {about['copied_bytes_per_second'] / 1e9:.1f} GB/s of memory; weights that fit the cache are read"
        f" faster. {about['note']}Models are random but for the trained run's. Of transformers, `generate` is measured,"
        " in batches of 16 in the order of arrival; its continuous batching "
        f"{f'fails for this model ({wrong})' if wrong else 'is not measured'}. Written by "
        "`experiments/benchmarks/serving.py`.",
        "",
        "| tokens per second | " + " | ".join(presets) + " |",
        "|---" * (1 + len(presets)) + "|",
    ]
    every = [name for preset in presets for name in report["results"][preset]]
    for name in dict.fromkeys(every):
        found = [report["results"][preset].get(name) for preset in presets]
        rates = ["" if result is None else f"{result['tokens_per_second']:,.0f}" for result in found]
        lines.append(f"| {name} | " + " | ".join(rates) + " |")
    lines += ["", "| | wanted | " + " | ".join(presets) + " |", "|---" * (2 + len(presets)) + "|"]
    for name in dict.fromkeys(name for preset in presets for name in report["summary"][preset]):
        found = [report["summary"][preset].get(name) for preset in presets]
        cells = ["" if value is None else f"{value:.2f}" for value in found]
        wanted = f"at least {WANTED[name]:g}" if name in WANTED else ""
        lines.append(f"| {name} | {wanted} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def continuous_batching(options: argparse.Namespace) -> str:
    """Returns why transformers' continuous batching fails for this architecture; an empty text if it does not.

    It is tried in a process of its own, because the cache that it allocates takes most of the memory.
    """
    theirs = Worker(options.oracle_python, "transformers_side.py", options.threads)
    try:
        smallest = published(ModelConfig.preset("tiny", num_nextn_predict_layers=0))
        return theirs.ask(do="continuous", config=smallest, dtype=options.dtype)["error"]
    finally:
        theirs.close()


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("DSV3_ORACLE_PYTHON", str(HERE.parents[1] / ".venv-oracle" / "bin" / "python"))
    parser.add_argument("--oracle-python", default=default, help="a Python that has torch and transformers")
    parser.add_argument("--presets", nargs="+", default=["nano", "mini"], help="sizes of the model")
    parser.add_argument("--run", type=Path, action="append", default=[], help="a trained run, of one of the presets")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads per library")
    parser.add_argument("--rounds", type=int, default=3, help="rounds in which all contenders take turns")
    parser.add_argument("--note", default="", help="a sentence about the measurement, for the table")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "serving", help="folder of the results")
    return parser.parse_args()


def main() -> None:
    options = parse()
    runs = {json.loads((run / "config.json").read_text(encoding="utf-8"))["preset"]: run for run in options.run}
    copied = copy_rate(options.threads)
    ours = Worker(sys.executable, "jax_side.py", options.threads)
    theirs = Worker(options.oracle_python, "transformers_side.py", options.threads)
    try:
        about = {
            "cpu": processor_name(),
            "copied_bytes_per_second": copied,
            "note": options.note and options.note + " ",
        }
        about |= {name: getattr(options, name) for name in ("threads", "dtype", "rounds")}
        report: dict[str, Any] = {"about": about | ours.ask(do="versions") | theirs.ask(do="versions")}
        report["about"]["continuous_batching"] = continuous_batching(options)
        report["results"] = {
            preset: measure(preset, runs.get(preset), ours, theirs, options) for preset in options.presets
        }
    finally:
        ours.close()
        theirs.close()
    report["summary"] = {preset: summary(preset, results, copied) for preset, results in report["results"].items()}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "benchmark.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / "benchmark.md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
