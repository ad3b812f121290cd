"""Describes clusters: peak rates, memory and links of their devices, and what kernels reach of them."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from typing import Literal

from dsv3_jax.errors import ConfigError

Platform = Literal["gpu", "tpu", "cpu"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One device and its links. Units are bytes, bytes/s and FLOP/s; links are counted in one direction.

    Attributes:
      name: the usual name of the device.
      platform: the compiler that it needs.
      memory: bytes of device memory.
      flops: the dense bfloat16 peak.
      fp8_flops: the dense FP8 peak; the bfloat16 peak where FP8 products are not faster.
      bandwidth: bandwidth of the device memory.
      node: devices joined by the fast links: a server of GPUs, or a slice of TPUs.
      inner_link: bandwidth from a device to the others of its node.
      outer_link: bandwidth from a device to devices of other nodes.
      flops_reached, fp8_reached, bandwidth_reached: fractions of the peaks that good kernels reach.
      largest: devices of the largest cluster that can be one mesh.
    """

    name: str
    platform: Platform
    memory: float
    flops: float
    fp8_flops: float
    bandwidth: float
    node: int
    inner_link: float
    outer_link: float
    flops_reached: float = 0.78
    fp8_reached: float = 0.78
    bandwidth_reached: float = 0.9
    largest: int = 2**20


# Peaks: vendors' data sheets. Reached on Hopper: cuBLAS 769-798 of 989 TFLOP/s in bfloat16 and 4.3 of 4.8 TB/s, both
# measured on an H200; DeepGEMM up to 1,550 of 1,979 in FP8. H800 links: the effective 160 and 50 GB/s of section 3.2.2.
# TPU links: one axis of the torus in both directions. No TPU here has an FP8 unit: FP8 products run as bfloat16.
_HOPPER = Accelerator(
    name="H100",
    platform="gpu",
    memory=80 * 2**30,
    flops=989e12,
    fp8_flops=1979e12,
    bandwidth=3.35e12,
    node=8,
    inner_link=450e9,
    outer_link=50e9,
)
_TPU = Accelerator(
    name="TPU v5p",
    platform="tpu",
    memory=95 * 2**30,
    flops=459e12,
    fp8_flops=459e12,
    bandwidth=2.765e12,
    node=8960,
    inner_link=180e9,
    outer_link=6e9,
    largest=6144,
)
ACCELERATORS: dict[str, Accelerator] = {
    "h100": _HOPPER,
    "h200": dataclasses.replace(_HOPPER, name="H200", memory=141e9, bandwidth=4.8e12),
    "h800": dataclasses.replace(_HOPPER, name="H800", inner_link=160e9),
    "v5p": _TPU,
    "v6e": dataclasses.replace(
        _TPU,
        name="TPU v6e",
        memory=32 * 2**30,
        flops=918e12,
        fp8_flops=918e12,
        bandwidth=1.64e12,
        node=256,
        largest=256,
    ),
}
"""The accelerators by the name that `--target` gives them; `local` is looked up when it is asked for."""

TARGET_NAMES = (*ACCELERATORS, "local")


@dataclasses.dataclass(frozen=True)
class Target:
    """A cluster.

    Attributes:
      accelerator: the kind of its devices.
      devices: how many there are.
      topology: sides of the torus of TPUs, such as (16, 16, 8).
    """

    accelerator: Accelerator
    devices: int
    topology: tuple[int, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Target:
        """Reads `h200:2048`, `v5p:512`, `v5p:16x16x8`, `v6e:16x16` or `local` (the devices of this machine).

        Raises:
          ConfigError: no such accelerator, or no such size of it.
        """
        name, _, size = text.strip().lower().partition(":")
        if name == "local":
            if size:
                raise ConfigError(f"target 'local' takes no size, since the machine has its own, not '{size}'")
            return local_target()
        if name not in ACCELERATORS:
            near = difflib.get_close_matches(name, TARGET_NAMES, n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(TARGET_NAMES)}"
            raise ConfigError(f"target '{name}' is not known; {hint} (such as h200:2048)")
        accelerator = ACCELERATORS[name]
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", size):
            raise ConfigError(f"target '{text}' needs a number of devices behind a colon, such as {name}:256")
        shape = tuple(int(part) for part in size.split("x"))
        devices = math.prod(shape)
        if devices > accelerator.largest:
            raise ConfigError(
                f"target '{text}' has {devices} devices; {accelerator.name} ends at {accelerator.largest}"
            )
        if accelerator.platform != "tpu":
            if len(shape) > 1:
                raise ConfigError(
                    f"target '{text}': GPU targets take a number of devices, not a topology: {name}:{devices}"
                )
            return cls(accelerator, devices)
        return cls(accelerator, devices, _torus(name, shape if len(shape) > 1 else (devices,)))

    @property
    def name(self) -> str:
        """The cluster as titles write it: `2,048 x H800`."""
        return f"{self.devices:,} x {self.accelerator.name}"


def local_target() -> Target:
    """Returns this machine: its accelerators where JAX sees known ones, else its processors.

    A CPU is rated at 50 GFLOP/s a core and 10 GB/s, which is the order of magnitude and no more.
    """
    import os

    import jax

    devices = jax.devices()
    kind = devices[0].device_kind.lower()
    for name, accelerator in ACCELERATORS.items():
        if name in kind:
            return Target(accelerator, len(devices), (len(devices), 1) if accelerator.platform == "tpu" else ())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    rate = 50e9 * (os.cpu_count() or 1)
    processors = Accelerator(
        name=f"{devices[0].platform} device",
        platform="cpu",
        memory=memory / len(devices),
        flops=rate / len(devices),
        fp8_flops=rate / len(devices),
        bandwidth=10e9,
        node=len(devices),
        inner_link=5e9,
        outer_link=1e9,
    )
    return Target(processors, len(devices))


def _torus(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the sides of a slice's torus; for a number of devices the most cubic shape that the hardware has."""
    rank = 3 if name == "v5p" else 2
    if len(shape) == rank:
        return shape
    (devices,) = shape if len(shape) == 1 else (0,)
    sides = [side for side in (1, 2, *range(4, 33, 4)) if devices and devices % side == 0]
    shapes = [combination for combination in _combinations(sides, rank) if math.prod(combination) == devices]
    if not shapes:
        raise ConfigError(
            f"target '{name}:{'x'.join(map(str, shape))}': a slice has {rank} sides of 1, 2 or multiples of 4, "
            f"such as {name}:{'4x4x4' if rank == 3 else '4x4'}"
        )
    return tuple(sorted(min(shapes, key=sum), reverse=True))


def _combinations(sides: list[int], rank: int) -> list[tuple[int, ...]]:
    if rank == 0:
        return [()]
    return [(side, *rest) for side in sides for rest in _combinations(sides, rank - 1)]
