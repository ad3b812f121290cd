"""Which implementation of an operation runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
from jax.sharding import get_abstract_mesh

Implementation = Literal["reference", "hopper", "tpu"]


def target_platform() -> Literal["cpu", "hopper", "gpu", "tpu"]:
    """What a program traced now is meant for: the abstract device of the mesh in force, or the default backend."""
    device = getattr(get_abstract_mesh(), "abstract_device", None)
    if device is not None:
        platform, kind = device.platform, device.device_kind
    else:
        platform, kind = jax.default_backend(), jax.devices()[0].device_kind
    if platform in ("gpu", "cuda"):
        return "hopper" if any(name in kind for name in ("H100", "H200", "H800", "GH200")) else "gpu"
    return "tpu" if platform == "tpu" else "cpu"


def choose_implementation(
    requested: Implementation | None, available: Sequence[Implementation] = ("reference",)
) -> str:
    """The implementation to run.

    Args:
      requested: by name, or None for the best one of `available` on the target platform.
      available: those this operation has for its operands' shapes and dtypes.

    Raises:
      ValueError: the requested one does not exist, is not available, or cannot run on the platform.
    """
    platform = target_platform()
    if requested is None:
        return next((name for name in available if name == platform), "reference")
    if requested not in get_args(Implementation):
        raise ValueError(f"implementation must be one of {', '.join(get_args(Implementation))}, not {requested!r}")
    if requested not in available:
        raise ValueError(f"implementation '{requested}' does not exist for these operands; there is {available}")
    if requested != "reference" and requested != platform:
        raise ValueError(f"implementation '{requested}' cannot run here: this program is for {platform}")
    return requested


def once_a_program(*static: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a kernel that a program calls at several places be traced, lowered and compiled there once for each shape.

    Without it every place is a kernel of its own: a training step calls each three times and more (the layer, the layer
    computed anew, the MTP modules), and compiling kernels is most of what compiling the step takes. Interpreted ones
    stay as they are: an interpreter's callbacks and what is dispatched behind them can wait for each other for ever.

    Args:
      static: arguments that are not arrays.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        compiled = jax.jit(function, static_argnames=static)

        @functools.wraps(function)
        def call(*arguments: Any, interpret: Any = None, **others: Any) -> Any:
            if interpret is not None:
                return function(*arguments, interpret=interpret, **others)
            return compiled(*arguments, **others)

        return call

    return decorate
