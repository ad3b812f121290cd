"""Measures speed and host memory of loading and saving checkpoints, compared with safetensors' own loader.

    python experiments/benchmarks/checkpoint_io.py [--gigabytes 4] [--folder /tmp] [--dtype bfloat16 fp8]

Writes a random checkpoint in V3's format and deletes it at the end. In alternating rounds, each in a process of its
own, it reads the same files with `safetensors.safe_open` (every tensor into memory) and with `load_hf`, and writes
with `save_hf`. safetensors' numpy loader does not support FP8, so FP8 is compared with its rate for bfloat16. The
files are in the page cache: the software is measured, not the disk. Writes checkpoint_io.json into
experiments/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from synthetic_checkpoint import architecture, write

RESULTS = Path(__file__).resolve().parents[1] / "results"

_YARDSTICK = """
import glob, sys, time
import jax  # as in our script, so that both processes hold the same libraries
from safetensors import safe_open
start = time.perf_counter()
loaded = {}
for path in sorted(glob.glob(sys.argv[1] + "/*.safetensors")):
    with safe_open(path, "numpy") as file:
        for name in file.keys():
            loaded[name] = file.get_tensor(name)
seconds = time.perf_counter() - start
size = sum(a.nbytes for a in loaded.values())
"""
_OURS = """
import sys, time
import jax
from flax import nnx
from dsv3_jax import load_hf
start = time.perf_counter()
loaded = jax.block_until_ready(jax.tree.leaves(nnx.state(load_hf(sys.argv[1]{options}))))
seconds = time.perf_counter() - start
size = sum(a.nbytes for a in loaded)
"""
_EXPORT = """
import sys, time
import jax
from flax import nnx
from dsv3_jax import load_hf, save_hf
model = load_hf(sys.argv[1]{options})
start = time.perf_counter()
save_hf(model, sys.argv[1] + "-export", max_shard_bytes=10**9)
seconds = time.perf_counter() - start
size = sum(a.nbytes for a in jax.tree.leaves(nnx.state(model)))
"""
_REPORT = """
import json, resource
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "arrays": size, "peak": peak}))
"""


def measure(script: str, folder: Path) -> dict[str, float]:
    """Runs a script in a new process and returns its seconds, the bytes of its arrays, and its peak resident memory."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", script + _REPORT, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def benchmark(folder: Path, gigabytes: float, form: Any, rounds: int) -> dict[str, Any]:
    """Measures a checkpoint of one format and returns the medians over alternating rounds."""
    target = folder / f"synthetic-{form}"
    try:
        size = write(target, architecture(gigabytes, form), form)
        scripts = {"load_hf": _OURS.format(options=""), "save_hf": _EXPORT.format(options="")}
        if form == "fp8":
            scripts["load_hf, FP8 kept"] = _OURS.format(options=", keep_fp8=True")
            scripts["save_hf"] = _EXPORT.format(options=", keep_fp8=True")
        else:
            scripts["safetensors"] = _YARDSTICK
        samples: dict[str, list[dict[str, float]]] = {name: [] for name in scripts}
        for _ in range(rounds):
            for name, script in scripts.items():
                samples[name].append(measure(script, target))
                shutil.rmtree(f"{target}-export", ignore_errors=True)
        return {
            "file_bytes": size,
            **{name: _summary(found, size) for name, found in samples.items()},
        }
    finally:
        shutil.rmtree(target, ignore_errors=True)
        shutil.rmtree(f"{target}-export", ignore_errors=True)


def _summary(samples: list[dict[str, float]], size: int) -> dict[str, float]:
    """Returns the medians of one script over all rounds; `size` is the bytes of the files."""
    seconds = statistics.median(sample["seconds"] for sample in samples)
    return {
        "seconds": round(seconds, 3),
        "gigabytes_per_second": round(size / seconds / 1e9, 3),
        "peak_beyond_arrays_megabytes": round(
            statistics.median(sample["peak"] - sample["arrays"] for sample in samples) / 1e6
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the checkpoint")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="folder to write it into")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each script")
    parser.add_argument("--dtype", nargs="+", choices=["bfloat16", "fp8", "float32"], default=["bfloat16", "fp8"])
    arguments = parser.parse_args()
    import jax
    import safetensors

    result: dict[str, Any] = {
        "device": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, files in the page cache",
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "safetensors": safetensors.__version__,
        },
    }
    for form in arguments.dtype:
        result[form] = found = benchmark(arguments.folder, arguments.gigabytes, form, arguments.rounds)
        print(f"{form}: {found['file_bytes'] / 1e9:.2f} GB")
        for name, figures in found.items():
            if isinstance(figures, dict):
                print(
                    f"  {name:20s} {figures['gigabytes_per_second']:6.2f} GB/s"
                    f"  {figures['peak_beyond_arrays_megabytes']:6d} MB beyond the arrays"
                )
        yardstick = found.get("safetensors") or result.get("bfloat16", {}).get("safetensors")
        if yardstick:
            ratio = found["load_hf"]["gigabytes_per_second"] / yardstick["gigabytes_per_second"]
            result[form]["throughput_beside_safetensors"] = round(ratio, 3)
            print(f"  load_hf reads {ratio:.2f} times as fast as safetensors")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "checkpoint_io.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
