"""Describes the devices of clusters that do not exist here, for the compiler.

Only a process of its own may use this: `prepare` decides which platform JAX compiles for.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
from typing import Any

from dsv3_jax.errors import UserError
from dsv3_jax.planning.hardware import Target

_GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  shared_memory_per_block: 49152
  shared_memory_per_core: 233472  threads_per_core_limit: 2048  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth:.0f}  l2_cache_size: 52428800  clock_rate_ghz: 1.98
  device_memory_size: {memory:.0f}  shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 minor: 0 }}  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "NVIDIA {name}"
"""


def why_unavailable(target: Target) -> str | None:
    """Returns what is missing to compile for `target` in this process, or None."""
    platform = target.accelerator.platform
    module = {"gpu": "jax_plugins.xla_cuda13", "tpu": "libtpu", "cpu": "jax"}[platform]
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        return (
            f"{module} is not importable: the compilers for absent hardware are installed by `make setup-aot`, or "
            "without a checkout by `pip install --no-deps --target aot jax-cuda13-plugin jax-cuda13-pjrt libtpu` with "
            "that folder on PYTHONPATH"
        )
    if platform == "gpu" and shutil.which("ptxas") is None:
        return "ptxas is not on PATH: it comes with the CUDA 13 toolkit and with the wheel nvidia-cuda-nvcc"
    return None


def prepare(target: Target) -> None:
    """Sets up JAX for the target, before it is first asked for devices."""
    if target.accelerator.platform == "tpu":
        os.environ.update(
            TPU_SKIP_MDS_QUERY="1",
            TPU_ACCELERATOR_TYPE="v5litepod-4",
            TPU_WORKER_HOSTNAMES="localhost",
            # libtpu locks the chip. There is none, so two compilations may run at once.
            ALLOW_MULTIPLE_LIBTPU_LOAD="1",
            TPU_LOG_DIR="disabled",  # else it leaves a folder in the system's temporary directory
        )
    if target.accelerator.platform == "cpu":
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={target.devices}"
    import jax

    jax.config.update("jax_platforms", "cpu")
    if target.accelerator.platform == "gpu":
        import jax_plugins.xla_cuda13  # pyright: ignore[reportMissingImports]

        # JAX finds the plugin by itself where its namespace package is on the path; registering twice is an error.
        with contextlib.suppress(Exception):
            jax_plugins.xla_cuda13.initialize()


def devices_of(target: Target) -> list[Any]:
    """Returns a description of every device of the cluster, in the order in which meshes are filled.

    Raises:
      UserError: the compiler does not know such a cluster.
    """
    import jax
    from jax.experimental import topologies

    accelerator = target.accelerator
    if accelerator.platform == "cpu":
        return jax.devices()
    if accelerator.platform == "gpu":
        hosts, left = divmod(target.devices, accelerator.node)
        shape = f"1x1x{target.devices}" if target.devices < accelerator.node else f"1x{hosts}x{accelerator.node}"
        if left and target.devices > accelerator.node:
            raise UserError(
                f"--target: GPUs come in nodes of {accelerator.node}; {target.devices} is no multiple of it"
            )
        text = _GPU.format(bandwidth=accelerator.bandwidth, memory=accelerator.memory, name=accelerator.name)
        return topologies.get_topology_desc(
            accelerator.name.lower(), platform="cuda", topology=shape, target_config=text
        ).devices
    name = f"{accelerator.name.split()[-1]}:{'x'.join(map(str, target.topology))}"
    try:
        return topologies.get_topology_desc(name, platform="tpu").devices
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--target {name}: the TPU compiler knows no such slice ({reason})") from None
