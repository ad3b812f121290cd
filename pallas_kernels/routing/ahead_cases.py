"""What is compiled ahead of this operation: V3's own router and width, and the routers of its relatives."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.compile_ahead import Case
from pallas_kernels.routing.reference import GateParameters

_TOKENS = 4096


def hopper() -> list[Case]:
    from pallas_kernels.routing import hopper_gate

    return _gates(hopper_gate)


def tpu() -> list[Case]:
    from pallas_kernels.routing import tpu_gate

    return _gates(tpu_gate)


# Name, experts, bias, parameters.
_ROUTERS = (
    ("gate of V3", 256, True, GateParameters(8, 8, 4, "sigmoid", "top2_sum", True, 2.5)),
    ("gate of V2-Lite", 64, False, GateParameters(6, 1, 1, "softmax", "max", False, 1.0)),
    ("gate of Kimi-K2", 384, True, GateParameters(8, 1, 1, "sigmoid", "top2_sum", True, 2.827)),
    ("gate, 8 groups of 8", 64, True, GateParameters(4, 8, 4, "softmax", "max", True, 1.0)),
    ("gate, 2 groups of 16", 32, False, GateParameters(4, 2, 1, "sigmoid", "top2_sum", True, 1.0)),
)


def _gates(kernels) -> list[Case]:
    return [
        Case(name, functools.partial(kernels.gate, parameters=parameters), _router(experts, biased))
        for name, experts, biased, parameters in _ROUTERS
    ]


def _router(experts: int, biased: bool):
    logits = jax.ShapeDtypeStruct((1, _TOKENS, experts), jnp.float32)
    return logits, jax.ShapeDtypeStruct((experts,), jnp.float32) if biased else None, None
