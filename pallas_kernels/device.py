"""Chooses the implementation of an operation: the reference in jax.numpy, or the kernels of an accelerator."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

import jax
from jax.sharding import AbstractDevice, AbstractMesh, get_abstract_mesh, use_abstract_mesh

Implementation = Literal["reference", "hopper", "tpu"]
LANES = 128  # numbers in a row of a TPU's vector register; blocks in its memory are multiples as wide
HOPPER_CAPABILITY = "9.0"
HOPPER_NAMES = ("H100", "H200", "H800", "H20")  # parts of the names of Hopper GPUs, GH200 among them
IMPLEMENTATIONS: tuple[Implementation, ...] = get_args(Implementation)


def target_platform() -> Literal["cpu", "hopper", "gpu", "tpu"]:
    """Returns what a program that is traced now will run on: the mesh's abstract device, or the default backend."""
    described = getattr(get_abstract_mesh(), "abstract_device", None)
    device = described or jax.devices()[0]
    if device.platform in ("gpu", "cuda"):
        return "hopper" if _compute_capability(device) == HOPPER_CAPABILITY else "gpu"
    return "tpu" if device.platform == "tpu" else "cpu"


@contextlib.contextmanager
def described_target(name: str, platform: Literal["gpu", "tpu"], num_cores: int | None = None) -> Iterator[None]:
    """Traces programs for a device that this machine need not have.

    Args:
      name: its kind, such as "NVIDIA H200" or "TPU v5p".
      num_cores: its multiprocessors, where a kernel is traced that asks for them.
    """
    device = AbstractDevice(device_kind=name, num_cores=num_cores, platform=platform)
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        yield


def _compute_capability(device: Any) -> str | None:
    """Returns the compute capability of a GPU, such as "9.0"; None where only a name is known and it is not Hopper's.

    A mesh describes its devices by name alone: such a name is looked up among the devices of this process.
    """
    if capability := getattr(device, "compute_capability", None):
        return capability
    if any(name in device.device_kind for name in HOPPER_NAMES):
        return HOPPER_CAPABILITY
    same = (each for each in jax.devices() if each.device_kind == device.device_kind)
    return next((getattr(each, "compute_capability", None) for each in same), None)


def choose_implementation(
    requested: Implementation | None, available: Sequence[Implementation] = IMPLEMENTATIONS
) -> Implementation:
    """Returns the name of the implementation to run.

    Args:
      requested: its name, or None for the best one of `available` on the target platform.
      available: the implementations that can take the operands at hand; the reference takes all.

    Raises:
      ValueError: the requested one does not exist, cannot take these operands or cannot run on the platform.
    """
    platform = target_platform()
    if requested is None:
        best: Implementation = "hopper" if platform == "hopper" else "tpu" if platform == "tpu" else "reference"
        return best if best in available else "reference"
    if requested not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, not {requested!r}")
    if requested not in available:
        raise ValueError(f"implementation '{requested}' does not exist for these operands; there is {available}")
    if requested != "reference" and requested != platform:
        raise ValueError(f"implementation '{requested}' cannot run here: this program is for {platform}")
    return requested


def kernel_module(operation: str, implementation: Implementation) -> Any:
    """Returns the module of an operation's implementation; one for an accelerator is imported when it is first used.

    Args:
      operation: a package of `pallas_kernels`, such as "quantize". Where a package has several operations, theirs are
        "routing/gate" and "routing/rows": `hopper_gate` and `hopper_rows`, with one `reference` for both.
    """
    package, _, part = operation.partition("/")
    name = f"{implementation}_{part}" if part and implementation != "reference" else implementation
    return importlib.import_module(f"pallas_kernels.{package}.{name}")


def once_a_program(*static: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Returns a decorator that has a kernel traced, lowered and compiled once per program and shape.

    Without it every call in a program is compiled for itself. A training step calls each kernel three times and more
    (in the layer, in its recomputation, in the MTP modules), and compiling kernels is most of what compiling the step
    takes. Interpreted kernels are left as they are: an interpreter's callbacks and the programs queued behind them can
    wait for each other for ever.

    Args:
      static: names of the arguments that are not arrays.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        compiled = jax.jit(function, static_argnames=static)

        @functools.wraps(function)
        def call(*arguments: Any, interpret: object = None, **others: Any) -> Any:
            if interpret is not None:
                return function(*arguments, interpret=interpret, **others)
            return compiled(*arguments, **others)

        return call

    return decorate
