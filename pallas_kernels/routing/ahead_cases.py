"""Lists what of routing is compiled ahead: V3's router and width, and the routers of its relatives."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.compile_ahead import Case
from pallas_kernels.routing.reference import GateParameters

_TOKENS = 4096


def hopper() -> list[Case]:
    from pallas_kernels.routing import hopper_gate, hopper_rows

    return [*_gates(hopper_gate), *_moves(hopper_rows)]


def tpu() -> list[Case]:
    from pallas_kernels.routing import tpu_gate, tpu_rows

    return [*_gates(tpu_gate), *_moves(tpu_rows)]


# Name, experts, bias, parameters.
_ROUTERS = (
    ("gate of V3", 256, True, GateParameters(8, 8, 4, "sigmoid", "top2_sum", True, 2.5)),
    ("gate of V2-Lite", 64, False, GateParameters(6, 1, 1, "softmax", "max", False, 1.0)),
    ("gate of Kimi-K2", 384, True, GateParameters(8, 1, 1, "sigmoid", "top2_sum", True, 2.827)),
    ("gate, 2 groups of 8", 16, True, GateParameters(4, 2, 1, "softmax", "max", True, 1.0)),
    ("gate, 2 groups of 16", 32, False, GateParameters(4, 2, 1, "sigmoid", "top2_sum", True, 1.0)),
)


# Name, tokens, experts per token, width, rows, dtype.
_MOVES = (
    ("V3, groups padded to 128", _TOKENS, 8, 7168, _TOKENS * 8 + 256 * 128, jnp.bfloat16),
    ("V3, not padded", _TOKENS, 8, 7168, _TOKENS * 8, jnp.bfloat16),
    ("V2-Lite, float32", _TOKENS, 6, 2048, _TOKENS * 6, jnp.float32),
    ("10 tokens of 768", 10, 2, 768, 24, jnp.bfloat16),
)

_VARIANTS = (
    "gate of Kimi-K2",
    "gate, 2 groups of 8",
    "gate, 2 groups of 16",
    "V3, not padded",
    "V2-Lite, float32",
    "10 tokens of 768",
)


def _moves(kernels) -> list[Case]:
    cases = []
    for name, tokens, chosen, width, count, dtype in _MOVES:
        x, rows = jax.ShapeDtypeStruct((tokens, width), dtype), jax.ShapeDtypeStruct((count, width), dtype)
        gate = jax.ShapeDtypeStruct((tokens, chosen), jnp.float32)
        row_of_slot, slot_of_row = (jax.ShapeDtypeStruct((n,), jnp.int32) for n in (tokens * chosen, count))
        cases += [
            Case(f"permute, {name}", kernels.permute, (x, row_of_slot, slot_of_row), name in _VARIANTS),
            Case(f"combine, {name}", kernels.combine, (rows, gate, row_of_slot), name in _VARIANTS),
            Case(
                f"gradient of combine, {name}",
                kernels.combine_gradient,
                (rows, gate, x, row_of_slot, slot_of_row),
                name in _VARIANTS,
            ),
        ]
    return cases


def _gates(kernels) -> list[Case]:
    return [
        Case(name, functools.partial(kernels.gate, parameters=parameters), _router(experts, biased), name in _VARIANTS)
        for name, experts, biased, parameters in _ROUTERS
    ]


def _router(experts: int, biased: bool):
    logits = jax.ShapeDtypeStruct((1, _TOKENS, experts), jnp.float32)
    return logits, jax.ShapeDtypeStruct((experts,), jnp.float32) if biased else None, None
