"""Checks the operands of grouped products; every error names the argument, what it is and what it should be."""

from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels.grouped_matmul.alignment import ROW_ALIGNMENT
from pallas_kernels.quantize.quantized import Quantized, check_quantized


def check_rows(lhs, rhs, group_sizes, row_alignment: int) -> bool:
    """Checks operands of rows by weights; returns whether both are FP8."""
    quantized = _both_or_neither(lhs, rhs)
    if quantized:
        check_quantized("lhs", lhs)
        check_quantized("rhs", rhs)
    if len(lhs.shape) != 2:
        raise ValueError(f"lhs must be [rows, in], not of shape {lhs.shape}")
    if len(rhs.shape) != 3 or rhs.shape[2] != lhs.shape[1]:
        raise ValueError(f"rhs must be [groups, out, {lhs.shape[1]}] as lhs is {lhs.shape}, not {rhs.shape}")
    if quantized:
        _check_tiles(lhs, rhs, "128x128")
    _check_integers("group_sizes", group_sizes, (rhs.shape[0],))
    _check_alignment(lhs.shape[0], row_alignment)
    return quantized


def check_contraction(lhs, rhs, group_sizes, accumulator, row_alignment: int) -> bool:
    """Checks operands of rows by rows; returns whether both are FP8, and then transposed."""
    quantized = _both_or_neither(lhs, rhs)
    if quantized:
        check_quantized("lhs", lhs)
        check_quantized("rhs", rhs)
        _check_tiles(lhs, rhs, "1x128")
    if group_sizes.ndim not in (1, 2):
        raise ValueError(f"group_sizes must be [groups] or [parts, groups], not of shape {group_sizes.shape}")
    *parts, groups = group_sizes.shape
    for name, operand in (("lhs", lhs), ("rhs", rhs)):
        if len(operand.shape) != 2 + len(parts):
            raise ValueError(f"{name} must have {2 + len(parts)} dimensions, not shape {operand.shape}")
    axis, width = (-1, -2) if quantized else (-2, -1)
    if lhs.shape[axis] != rhs.shape[axis]:
        raise ValueError(f"lhs and rhs must have the same number of rows, not {lhs.shape} and {rhs.shape}")
    if not list(lhs.shape[:-2]) == list(rhs.shape[:-2]) == parts:
        raise ValueError(f"lhs {lhs.shape} and rhs {rhs.shape} must have the {parts[0]} parts of group_sizes")
    _check_integers("group_sizes", group_sizes, group_sizes.shape)
    _check_alignment(lhs.shape[axis], row_alignment)
    wanted = (groups, lhs.shape[width], rhs.shape[width])
    if accumulator is not None and accumulator.shape != wanted:
        raise ValueError(f"accumulator must have shape {wanted}, not {accumulator.shape}")
    if accumulator is not None and accumulator.dtype != jnp.float32:
        raise TypeError(f"accumulator must be float32, not {accumulator.dtype}")
    if quantized and row_alignment % ROW_ALIGNMENT:
        raise ValueError(
            f"row_alignment must be a multiple of {ROW_ALIGNMENT} for FP8 operands, whose tiles run along the rows, "
            f"not {row_alignment}"
        )
    return quantized


def check_masked(lhs, rhs, counts) -> bool:
    """Checks operands of the masked layout; returns whether both are FP8."""
    quantized = _both_or_neither(lhs, rhs)
    if quantized:
        check_quantized("lhs", lhs, ndim=3)
        check_quantized("rhs", rhs, ndim=3)
        _check_tiles(lhs, rhs, "128x128")
    if len(lhs.shape) != 3:
        raise ValueError(f"lhs must be [groups, rows, in], not of shape {lhs.shape}")
    if len(rhs.shape) != 3 or rhs.shape[0] != lhs.shape[0] or rhs.shape[2] != lhs.shape[2]:
        raise ValueError(f"rhs must be [{lhs.shape[0]}, out, {lhs.shape[2]}] as lhs is {lhs.shape}, not {rhs.shape}")
    _check_integers("counts", counts, (lhs.shape[0],))
    return quantized


def _both_or_neither(lhs, rhs) -> bool:
    quantized = [isinstance(operand, Quantized) for operand in (lhs, rhs)]
    if any(quantized) != all(quantized):
        raise TypeError("lhs and rhs must both be Quantized or both be arrays")
    if not any(quantized) and lhs.dtype != rhs.dtype:
        raise TypeError(f"lhs and rhs must have one dtype, not {lhs.dtype} and {rhs.dtype}")
    return all(quantized)


def _check_tiles(lhs: Quantized, rhs: Quantized, of_rhs: str) -> None:
    if lhs.tile != "1x128":
        raise ValueError(f"lhs must be in 1x128 tiles, not {lhs.tile}")
    if rhs.tile != of_rhs:
        raise ValueError(f"rhs must be in {of_rhs} tiles, not {rhs.tile}")


def _check_integers(name: str, numbers, wanted: tuple[int, ...]) -> None:
    if numbers.shape != wanted:
        raise ValueError(f"{name} must have shape {wanted} as rhs has groups, not {numbers.shape}")
    if not jnp.issubdtype(numbers.dtype, jnp.integer):
        raise TypeError(f"{name} must hold integers, not {numbers.dtype}")


def _check_alignment(rows: int, row_alignment: int) -> None:
    if row_alignment < 1 or rows % row_alignment:
        raise ValueError(f"row_alignment must divide the {rows} rows of lhs, not {row_alignment}")
