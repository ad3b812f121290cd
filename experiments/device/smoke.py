"""Checks that the machine is as expected: GPU, software, compilers, and a first product."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from cases import Case


def cases(tiny: bool) -> Iterator[Case]:
    yield Case("ptxas", lambda: {"passed": tiny or shutil.which("ptxas") is not None, "text": _ptxas()})
    yield Case("device", lambda: _device(tiny))
    yield Case("product", _product)


def _ptxas() -> str:
    tool = shutil.which("ptxas")
    if tool is None:
        return "no ptxas on PATH"
    return tool + ": " + subprocess.run([tool, "--version"], capture_output=True, text=True).stdout.split("\n")[-2]


def _device(tiny: bool) -> dict:
    device = jax.devices()[0]
    found = {"platform": device.platform, "device": device.device_kind, "cores": getattr(device, "core_count", None)}
    from pallas_kernels.device import target_platform

    return {"passed": target_platform() == "hopper" and (tiny or device.platform == "gpu"), **found}


def _product() -> dict:
    x = jax.random.normal(jax.random.key(0), (512, 512), jnp.bfloat16)
    return {"passed": bool(jnp.isfinite(jax.jit(lambda x: x @ x)(x)).all())}
