"""Compiles the kernels for Hopper and for TPUs on a machine that has neither, and reads what the compilers report.

    python -m pallas_kernels.compile_ahead hopper blockwise_matmul quantize
    python -m pallas_kernels.compile_ahead v6e blockwise_matmul

prints a JSON list with one entry a kernel: registers, spills, shared memory and tensor-core instructions on Hopper, the
size of the program on a TPU. Needs the wheels of the extra `aot` on PYTHONPATH (`make setup-aot` puts them into
`.venv/aot`) and, for Hopper, ptxas on PATH. Run it in a process of its own: a CUDA plugin or libtpu changes what a JAX
process believes its devices to be.

An operation lists what to compile in its module `ahead_cases`: functions `hopper()` and `tpu()`, of which it may lack
one, that return `Case`s.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import importlib.util
import io
import json
import os
import pathlib
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

TPU_TOPOLOGIES = {"v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
TARGETS = ("hopper", *TPU_TOPOLOGIES)

_H200 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  shared_memory_per_block: 49152
  shared_memory_per_core: 233472  threads_per_core_limit: 2048  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000  l2_cache_size: 52428800  clock_rate_ghz: 1.98
  device_memory_size: 151000000000  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""


@dataclasses.dataclass(frozen=True)
class Case:
    """One program to compile: `function(*arguments)`, the arguments given as `jax.ShapeDtypeStruct` trees."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


def why_unavailable(target: str) -> str | None:
    """What is missing to compile for `target` in this process, or None."""
    module = "jax_plugins.xla_cuda13" if target == "hopper" else "libtpu"
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        return f"{module} is not importable: install the extra 'aot' (make setup-aot) and put .venv/aot on PYTHONPATH"
    if target == "hopper" and shutil.which("ptxas") is None:
        return "ptxas is not on PATH: it comes with the CUDA 13 toolkit and with the wheel nvidia-cuda-nvcc"
    return None


def compile_cases(target: str, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Compiles each case for `target` and returns what the compiler said of it."""
    return [_compile_for_hopper(case) if target == "hopper" else _compile_for_tpu(case, target) for case in cases]


def _compile_for_hopper(case: Case) -> dict[str, Any]:
    from pallas_kernels.hopper_launch import hopper_target

    device = _device("h200", "cuda", topology="1x1x1", target_config=_H200)
    start = time.perf_counter()
    # Naming the folder while lowering would also write down every step of Mosaic's search for layouts, a quarter of the
    # time: without it the resources are printed, in the order in which the files' names are numbered.
    resources = io.StringIO()
    with hopper_target(), _environment(MOSAIC_GPU_DUMP_RESOURCES="1"), contextlib.redirect_stdout(resources):
        lowered = _lower(case, device, "cuda")
    with tempfile.TemporaryDirectory() as folder, _environment(MOSAIC_GPU_DUMP_TO=folder):
        lowered.compile()
        seconds = round(time.perf_counter() - start, 2)
        reports = sorted(pathlib.Path(folder).glob("*.ptxas"), key=lambda path: int(path.stem.rsplit("_", 1)[1]))
        shared = re.findall(r"smem_scratch_bytes=(\d+)", resources.getvalue())
        kernels = [_read_ptxas(path, int(size)) for path, size in zip(reports, shared, strict=True)]
    if not kernels:
        raise RuntimeError(f"{case.name}: the compiler wrote no report; does the case contain a Mosaic GPU kernel?")
    return {"case": case.name, "seconds": seconds, "kernels": kernels}


def _compile_for_tpu(case: Case, target: str) -> dict[str, Any]:
    device = _device(TPU_TOPOLOGIES[target], "tpu")
    start = time.perf_counter()
    memory = _lower(case, device, "tpu").compile().memory_analysis()
    seconds = round(time.perf_counter() - start, 2)
    return {"case": case.name, "seconds": seconds, "program_bytes": memory.generated_code_size_in_bytes}


def _lower(case: Case, device: Any, platform: str) -> Any:
    import jax

    sharding = jax.sharding.SingleDeviceSharding(device)
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), case.arguments)
    return jax.jit(case.function).trace(*arguments).lower(lowering_platforms=(platform,))


def _device(name: str, platform: str, **options: str) -> Any:
    from jax.experimental import topologies

    return topologies.get_topology_desc(name, platform=platform, **options).devices[0]


def _read_ptxas(report: pathlib.Path, shared_memory_bytes: int) -> dict[str, Any]:
    """One kernel's resources from ptxas's report and the PTX beside it; Mosaic lays out the shared memory itself."""
    text = report.read_text()
    ptx = report.with_suffix(".ptx").read_text()
    return {
        "kernel": re.sub(r"_\d+$", "", report.stem),
        "registers": _number(r"Used (\d+) registers", text),
        "stack_bytes": _number(r"(\d+) bytes stack frame", text),
        "spill_store_bytes": _number(r"(\d+) bytes spill stores", text),
        "spill_load_bytes": _number(r"(\d+) bytes spill loads", text),
        "shared_memory_bytes": shared_memory_bytes,
        "serialized_wgmma": "C7510" in text,
        "set_max_registers_ignored": "C7508" in text,
        "tensor_core": sorted(set(re.findall(r"wgmma\.mma_async\S*", ptx))),
        "fused_multiply_adds": len(re.findall(r"\bfma\.rn\.f32", ptx)),
    }


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the compiler's report has no {pattern!r}:\n{text}")
    return int(found.group(1))


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _prepare(target: str) -> None:
    """What must be in place before jax is first asked for devices."""
    import jax

    # With another platform named, the CUDA plugin would look for a driver and cuDNN.
    jax.config.update("jax_platforms", "cpu")
    if target == "hopper":
        import jax_plugins.xla_cuda13  # pyright: ignore[reportMissingImports]

        # JAX finds the plugin by itself where its namespace package is on the path; registering twice is an error.
        with contextlib.suppress(Exception):
            jax_plugins.xla_cuda13.initialize()
    else:
        os.environ.update(
            TPU_SKIP_MDS_QUERY="1",
            TPU_ACCELERATOR_TYPE="v5litepod-4",
            TPU_WORKER_HOSTNAMES="localhost",
            # libtpu locks the chip, of which there is none: two compilations may run at once.
            ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.compile_ahead", description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("operations", nargs="+", help="packages of pallas_kernels, for example blockwise_matmul")
    parser.add_argument("--out", type=pathlib.Path, help="file for the JSON; standard output unless given")
    options = parser.parse_args(arguments)
    if reason := why_unavailable(options.target):
        print(reason, file=sys.stderr)
        return 2
    _prepare(options.target)
    results = {}
    for operation in options.operations:
        module = importlib.import_module(f"pallas_kernels.{operation}.ahead_cases")
        list_cases = getattr(module, "hopper" if options.target == "hopper" else "tpu", list)
        results[operation] = compile_cases(options.target, list_cases())
    text = json.dumps(results, indent=1)
    if options.out:
        options.out.write_text(text + "\n")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
