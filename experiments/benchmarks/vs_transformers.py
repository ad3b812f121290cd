"""Compares this project with transformers' DeepseekV3ForCausalLM on this machine's CPU.

    python experiments/benchmarks/vs_transformers.py --oracle-python .venv-oracle/bin/python

Configuration, batch and number of threads are the same. Each library runs in a process of its own, and only one runs at
a time (the other is stopped), in alternating rounds, so that changes of the machine's speed affect both. The script
times training steps (forward, backward, AdamW), prefill, and batch-1 decoding with a cache, in float32 and in bfloat16,
transformers eager and compiled; then start-up times and the cost of more experts. In bfloat16 transformers trains
bfloat16 weights; this project trains its recipe, float32 masters and moments. Beside the times stands a floor: the
model's operations at the rate of a large product, and the bytes of the weights and of AdamW at the rate of a copy, both
measured in this project's process. Writes vs_transformers.json and vs_transformers.md into experiments/results/.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv3_jax import ModelConfig
from dsv3_jax.counts import count_flops
from dsv3_jax.operating_system import processor_name

HERE = Path(__file__).resolve().parent
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # for both sides; `dsv3 train` asks for them itself
OURS, EAGER, COMPILED = "this project", "transformers", "transformers + torch.compile"


class Worker:
    """One library in its own process, which is stopped except while it answers a request."""

    def __init__(self, python: str, script: str, threads: int):
        cores = sorted(os.sched_getaffinity(0))[:threads]
        environment = os.environ | HUGE_PAGES | {"OMP_NUM_THREADS": str(threads), "JAX_PLATFORMS": "cpu"}
        self.process = subprocess.Popen(
            [python, "-P", str(HERE / script)],  # -P: no file of this folder hides a module
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Sends a request and returns the answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{' '.join(self.process.args)} ended while it answered {request}")
        self.process.send_signal(signal.SIGSTOP)
        return json.loads(answer)

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()


@dataclasses.dataclass(frozen=True)
class Contender:
    """One implementation of a task: the library that runs it, and the request that prepares it."""

    worker: Worker
    request: dict[str, Any]


def published(config: ModelConfig) -> dict[str, Any]:
    """Returns the configuration as arguments of transformers' DeepseekV3Config."""
    ours_alone = ("scoring_func", "topk_method", "latent_norm_eps", "mtp_hidden_after_final_norm")
    renamed = ("rope_scaling", "rope_theta")
    values = {name: value for name, value in config.to_dict().items() if name not in (*ours_alone, *renamed)}
    return values | {
        "num_key_value_heads": config.num_attention_heads,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
    }


def race(contenders: dict[str, Contender], rounds: int, repeats: int) -> dict[str, Any]:
    """Prepares all contenders, then runs each `repeats` times in turn, for `rounds` rounds, and returns the times."""
    prepared = {}
    for name, contender in contenders.items():
        prepared[name] = contender.worker.ask(do="prepare", name=name, **contender.request)["seconds"]
        print(f"{name}: first run {prepared[name]:.1f} s", file=sys.stderr, flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    values: dict[str, list[Any]] = {name: [] for name in contenders}
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        for name, contender in contenders.items():
            answer = contender.worker.ask(do="round", name=name, repeats=repeats)
            seconds[name].append(statistics.median(answer["seconds"]))
            values[name] += answer.get("values", [])
    for contender in contenders.values():
        contender.worker.ask(do="forget")
    first = next(iter(contenders))
    return {
        name: {
            "first_run_seconds": prepared[name],
            "round_seconds": seconds[name],
            "seconds": statistics.median(seconds[name]),
            "times_first": statistics.median(a / b for a, b in zip(seconds[name], seconds[first], strict=True)),
            "values": values[name],
        }
        for name in contenders
    }


def compare(task: str, preset: str, ours: Worker, theirs: Worker, options: argparse.Namespace) -> dict[str, Any]:
    """Compares one task at one size in each dtype: this project, transformers, and, except for decoding, compiled."""
    # transformers has no MTP in training, so neither side computes it.
    config = ModelConfig.preset(preset, num_nextn_predict_layers=0)
    shapes = {
        "train": {"batch": options.batch, "length": options.length},
        "prefill": {"batch": 1, "length": options.length},
        "decode": {"batch": 1, "length": 32, "new_tokens": options.new_tokens},
    }[task]
    contenders = {}
    for dtype in options.dtypes:
        request = {"task": task, "dtype": dtype, **shapes}
        contenders[f"{OURS}, {dtype}"] = Contender(ours, request | {"config": config.to_dict()})
        eager = Contender(theirs, request | {"config": published(config), "compile": False})
        contenders[f"{EAGER}, {dtype}"] = eager
        if task != "decode" and not options.no_compile:
            contenders[f"{COMPILED}, {dtype}"] = Contender(theirs, eager.request | {"compile": True})
    results = race(contenders, options.rounds, options.repeats)
    tokens = shapes.get("new_tokens", shapes["batch"] * shapes["length"])
    for result in results.values():
        result["tokens_per_second"] = tokens / result["seconds"]
    return {"task": task, "preset": preset, **shapes, "results": results, "floors": floors(task, config, shapes, ours)}


def floors(task: str, config: ModelConfig, shapes: dict[str, int], ours: Worker) -> dict[str, dict[str, float]]:
    """Returns, by dtype, the seconds of a task's operations and bytes at rates measured now; none of decoding."""
    if task == "decode":
        return {}
    rates = ours.ask(do="rates")
    flops = count_flops(config, shapes["length"])
    each = flops.training if task == "train" else flops.forward
    weights = config.num_parameters()
    found = {}
    for dtype, bytes_each in (("float32", 4), ("bfloat16", 2)):
        # AdamW reads weights, two moments and the gradient and writes all but the last, in float32.
        moved = 7 * 4 * weights if task == "train" else bytes_each * weights
        operations = each * shapes["batch"] * shapes["length"]
        found[dtype] = {"operations": operations / rates[dtype], "bytes": moved / rates["copy"]}
    return found


def more_experts(ours: Worker, theirs: Worker, options: argparse.Namespace) -> dict[str, Any]:
    """Times a training step of the preset nano with 32 and with 128 routed experts, with equally many active."""
    shapes = {"task": "train", "dtype": options.dtypes[0], "batch": options.batch, "length": options.length}
    costs = {}
    for name, worker in ((OURS, ours), (EAGER, theirs)):
        contenders = {}
        for experts in (32, 128):
            config = ModelConfig.preset("nano", num_nextn_predict_layers=0, n_routed_experts=experts)
            values = config.to_dict() if worker is ours else published(config) | {"compile": False}
            request = shapes | {"config": values}
            if worker is theirs:
                request["compile"] = False
            contenders[str(experts)] = Contender(worker, request)
        costs[name] = race(contenders, options.rounds, options.repeats)
    return costs


def start_up(ours: Worker, options: argparse.Namespace) -> dict[str, Any]:
    """Times compiling the training step of the preset nano, and lowering that of the 671B model with two depths."""
    shapes = {"batch": options.batch, "length": options.length}
    times = {"nano": ours.ask(do="startup", preset="nano", overrides={}, **shapes, compile=True)}
    for layers in (4, 61):
        overrides = {"num_hidden_layers": layers}
        times[f"v3-671b, {layers} layers"] = ours.ask(
            do="startup", preset="v3-671b", overrides=overrides, batch=1, length=4096, compile=False
        )
    return times


def markdown(report: dict[str, Any]) -> str:
    """Returns the report as Markdown tables."""
    about = report["about"]
    lines = [
        "# Against transformers",
        "",
        *([f"**{about['note']}**", ""] if about["note"] else []),
        f"{about['cpu']}, {about['threads']} threads; jax {about['jax']}, torch {about['torch']}, "
        f"transformers {about['transformers']}. Medians of {about['rounds']} alternating rounds; "
        "neither side computes MTP. Written by `experiments/benchmarks/vs_transformers.py`.",
        "",
        "| task | size | batch x tokens | dtype | this project | transformers | compiled | times eager "
        "| times compiled | floor: operations + bytes |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["comparisons"]:
        tokens = f"{row['length']} + {row['new_tokens']}" if "new_tokens" in row else str(row["length"])
        for dtype in about["dtypes"]:
            found = [row["results"].get(f"{name}, {dtype}") for name in (OURS, EAGER, COMPILED)]
            rates = [f"{result['tokens_per_second']:,.0f} tok/s" if result else "" for result in found]
            gains = [f"{result['seconds'] / found[0]['seconds']:.2f}" if result else "" for result in found[1:]]
            floor = row["floors"].get(dtype)
            least = f"{floor['operations'] * 1e3:.0f} + {floor['bytes'] * 1e3:.0f} of " if floor else ""
            cells = [row["task"], row["preset"], f"{row['batch']} x {tokens}", dtype, *rates, *gains]
            lines.append("| " + " | ".join([*cells, f"{least}{found[0]['seconds'] * 1e3:.0f} ms"]) + " |")
    lines += ["", "Best against best, over both dtypes, eager and compiled:", ""]
    for row in report["comparisons"]:
        best = {}
        for name, result in row["results"].items():
            side = name.startswith(OURS)
            if side not in best or result["seconds"] < best[side][1]["seconds"]:
                best[side] = (name, result)
        (own, fast), (other, slow) = best[True], best[False]
        gain = slow["seconds"] / fast["seconds"]
        lines.append(f"- {row['task']} {row['preset']}: {own} is {gain:.2f} times as fast as {other}")
    if report["left_out"]:
        lines += ["", f"Left out for lack of time: {', '.join(report['left_out'])}."]
    if "start_up" in report:
        lines += ["", "| training step of | trace and lower | compile |", "|---|---|---|"]
        for name, seconds in report["start_up"].items():
            compiled = f"{seconds['compile']:.1f} s" if "compile" in seconds else "not compiled"
            lines.append(f"| {name} | {seconds['lower']:.1f} s | {compiled} |")
    if "more_experts" in report:
        lines += ["", "| nano, 4 active experts of | 32 | 128 | cost of 4 times the experts |", "|---|---|---|---|"]
        for name, costs in report["more_experts"].items():
            few, many = costs["32"]["seconds"], costs["128"]["seconds"]
            lines.append(
                f"| {name} | {few * 1e3:.0f} ms | {many * 1e3:.0f} ms | {costs['128']['times_first'] - 1:+.0%} |"
            )
    return "\n".join(lines) + "\n"


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("DSV3_ORACLE_PYTHON", str(HERE.parents[1] / ".venv-oracle" / "bin" / "python"))
    parser.add_argument("--oracle-python", default=default, help="a Python that has torch and transformers")
    parser.add_argument("--presets", nargs="+", default=["nano", "mini"], help="sizes of the model")
    parser.add_argument("--tasks", nargs="*", default=["train", "prefill", "decode"], help="tasks to time")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--note", default="", help="a remark that the table begins with, such as on other load")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads per library")
    parser.add_argument("--batch", type=int, default=8, help="sequences per training step")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=7, help="rounds in which all contenders take turns")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each contender per round")
    parser.add_argument("--no-compile", action="store_true", help="do not time torch.compile")
    parser.add_argument("--no-extras", action="store_true", help="do not time start-up and more experts")
    parser.add_argument("--minutes", type=float, default=0, help="leave out what would take longer; 0 for no limit")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results", help="folder of the results")
    return parser.parse_args()


def main() -> None:
    options = parse()
    ours = Worker(sys.executable, "jax_side.py", options.threads)
    theirs = Worker(options.oracle_python, "transformers_side.py", options.threads)
    try:
        about = {"cpu": processor_name(), "python": platform.python_version()}
        about |= {name: getattr(options, name) for name in ("threads", "dtypes", "rounds", "repeats", "note")}
        report: dict[str, Any] = {"about": about | ours.ask(do="versions") | theirs.ask(do="versions")}
        report["comparisons"] = []
        parts: list[tuple[str, Callable[[], Any]]] = [
            (f"{task} {preset}", functools.partial(compare, task, preset, ours, theirs, options))
            for task in options.tasks
            for preset in options.presets
        ]
        if not options.no_extras:
            parts.append(("more_experts", functools.partial(more_experts, ours, theirs, options)))
            parts.append(("start_up", functools.partial(start_up, ours, options)))
        measure(parts, report, options)
    finally:
        ours.close()
        theirs.close()
    print(markdown(report))


def measure(parts: list[tuple[str, Callable[[], Any]]], report: dict[str, Any], options: argparse.Namespace) -> None:
    """Measures each part and writes the report after it; parts for which the time does not suffice are left out."""
    began, longest = time.monotonic(), 0.0
    options.out.mkdir(parents=True, exist_ok=True)
    report["left_out"] = []
    for name, part in parts:
        start = time.monotonic()
        if options.minutes and start + longest > began + 60 * options.minutes:
            report["left_out"].append(name)
        elif name in ("more_experts", "start_up"):
            report[name] = part()
        else:
            report["comparisons"].append(part())
        longest = max(longest, time.monotonic() - start)
        (options.out / "vs_transformers.json").write_text(json.dumps(report, indent=1) + "\n")
        (options.out / "vs_transformers.md").write_text(markdown(report))


if __name__ == "__main__":
    main()
