"""Measures the host memory that starting a run on a mesh from a checkpoint takes, beyond the run's state.

    python experiments/benchmarks/start_memory.py [--gigabytes 1] [--folder /tmp] [--mesh fsdp=4,expert=2]

Makes a random checkpoint in the published layout (and deletes it), then starts a run from it, and from the run folder
that `dsv3 import-hf` makes of it, on eight simulated CPU devices, which keep their shards in the memory of the host. A
fresh process reads its resident memory before the start, and its peak after it. The state arrays (parameters, moments,
running average) are subtracted; devices that keep equal shards share one array. Also measures the peak of
`dsv3 import-hf` itself. Writes start_memory.json into experiments/results/.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results"
DEVICES = 8


def measure(source: Path, mesh: str) -> dict[str, Any]:
    """Starts a run from `source` on the devices of this process, and returns bytes and seconds."""
    import jax

    from dsv3_jax.data import DataConfig
    from dsv3_jax.interop.streaming import PIECE_BYTES
    from dsv3_jax.runs.starting_point import architecture_of_source, load_starting_point
    from dsv3_jax.runs.starting_state import starting_state
    from dsv3_jax.sharding.mesh import MeshConfig
    from dsv3_jax.training.config import RunConfig, TrainingConfig
    from dsv3_jax.training.state_layout import StateLayout

    def run(model: Any) -> RunConfig:
        data = DataConfig(vocab_size=model.vocab_size, sequence_length=64)
        return RunConfig(preset="", model=model, data=data, training=TrainingConfig())

    layout = StateLayout.of(MeshConfig.parse(mesh))
    model = architecture_of_source(source)
    small = model.replace(hidden_size=64, moe_intermediate_size=64, intermediate_size=64, vocab_size=512)
    jax.block_until_ready(starting_state(run(small), layout))  # what JAX and the compiler allocate once
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # gives free memory back to the system, so that it is not counted as used before
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    began = time.perf_counter()
    _, state = starting_state(run(model), layout, functools.partial(load_starting_point, source, run(model)))
    jax.block_until_ready(state)
    seconds = time.perf_counter() - began
    peak = _resident("VmHWM")
    leaves = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    shards = [shard.data for leaf in leaves for shard in leaf.addressable_shards]
    distinct = {shard.unsafe_buffer_pointer(): shard.nbytes for shard in shards}
    parameters = jax.tree.leaves(state.params)
    return {
        "mesh": mesh,
        "parameter_bytes": sum(leaf.nbytes for leaf in parameters),
        "parameter_bytes_of_one_device": sum(leaf.addressable_shards[0].data.nbytes for leaf in parameters),
        "piece_bytes": PIECE_BYTES,
        "state_bytes": sum(distinct.values()),
        "peak_beyond_state_bytes": peak - before - sum(distinct.values()),
        "seconds": round(seconds, 1),
    }


def _resident(name: str) -> int:
    """Returns VmRSS (now) or VmHWM (the peak) of this process in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def _in_a_process(*arguments: str) -> dict[str, Any]:
    flags = f"--xla_force_host_platform_device_count={DEVICES}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run([sys.executable, __file__, *arguments], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def _import(source: Path, target: Path) -> dict[str, Any]:
    """Runs `dsv3 import-hf` in this process and returns its peak memory in bytes."""
    from dsv3_jax.cli.main import main as dsv3

    began = time.perf_counter()
    if dsv3(["import-hf", str(source), str(target), "--tokenizer", "byte"]):
        raise SystemExit(1)
    seconds = round(time.perf_counter() - began, 1)
    return {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--mesh", default="fsdp=4,expert=2")
    parser.add_argument("--measure", type=Path, metavar="SOURCE", help="only start from SOURCE, in this process")
    parser.add_argument("--import", dest="import_", type=Path, nargs=2, metavar=("SOURCE", "RUN"), help="only import")
    arguments = parser.parse_args()
    if arguments.measure or arguments.import_:
        found = _import(*arguments.import_) if arguments.import_ else measure(arguments.measure, arguments.mesh)
        print(json.dumps(found))
        return
    from synthetic_checkpoint import architecture, write

    source, run = arguments.folder / "start-memory", arguments.folder / "start-memory-run"
    try:
        file_bytes = write(source, architecture(arguments.gigabytes, "bfloat16"), "bfloat16")
        result: dict[str, Any] = {"file_bytes": file_bytes}
        result["import-hf"] = _in_a_process("--import", str(source), str(run))
        for name, folder in (("published checkpoint", source), ("run folder", run)):
            result[name] = found = _in_a_process("--measure", str(folder), "--mesh", arguments.mesh)
            print(
                f"from a {name}: {found['peak_beyond_state_bytes'] / 1e6:.0f} MB beyond the state of "
                f"{found['state_bytes'] / 1e6:.0f} MB (one device's parameters: "
                f"{found['parameter_bytes_of_one_device'] / 1e6:.0f} MB), {found['seconds']} s"
            )
    finally:
        shutil.rmtree(source, ignore_errors=True)
        shutil.rmtree(run, ignore_errors=True)
    print(f"import-hf: peak {result['import-hf']['peak_bytes'] / 1e6:.0f} MB, {result['import-hf']['seconds']} s")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "start_memory.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
