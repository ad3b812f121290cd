"""Times attention at V3's widths beside cuDNN with padded values and, in a check of its own, beside PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from cases import Case
from timing import Contender, Problem, timed_cases

from pallas_kernels.latent_attention import cudnn, hopper_backward, hopper_forward
from pallas_kernels.latent_attention.operands import OfResult, Operands

OWN, SHARED, VALUE = 128, 64, 128
SCALE = (OWN + SHARED) ** -0.5
SIZES = ((1, 4096, 128), (4, 4096, 16), (1, 4096, 16))  # batch, length, heads


def cases(tiny: bool, form: str) -> Iterator[Case]:
    if tiny:
        return  # an interpreter takes minutes at these widths
    for size in SIZES[: 3 if form == "forward" else 2]:
        if form == "torch":
            yield from torch_cases(*size)
        else:
            yield from timed_cases((forward if form == "forward" else backward)(*size))


def operations(batch: int, length: int, heads: int, widths: int) -> float:
    """Returns the operations of causal products whose widths add up to `widths`."""
    return batch * heads * length * (length + 1) * widths


def forward(batch: int, length: int, heads: int) -> Problem:
    inputs = ("q", "k", "v", "k_shared")
    contenders = {
        "ours": Contender(lambda *x: hopper_forward.forward(Operands(*x, None), SCALE, True), inputs),
        "cuDNN, padded": Contender(through_cudnn, inputs),
    }
    return Problem(
        f"attention {batch} x {length}, {heads} heads",
        functools.partial(make, batch, length, heads),
        contenders,
        flops=operations(batch, length, heads, OWN + SHARED + VALUE),
    )


def backward(batch: int, length: int, heads: int) -> Problem:
    """Returns the backward pass: dV, dP, dQ, dK and S, which is recomputed. cuDNN's time includes its forward pass."""
    inputs = ("q", "k", "v", "k_shared", "bar", "log_sums", "mean")

    def ours(q, k, v, k_shared, *others):
        return hopper_backward.backward(Operands(q, k, v, k_shared, None), OfResult(*others), SCALE, True)

    contenders = {
        "ours": Contender(ours, inputs),
        "ours, queries": Contender(lambda *x: ours(*x)[0], inputs),
        "ours, keys": Contender(lambda *x: ours(*x)[1:], inputs),
        "cuDNN, padded, with forward": Contender(
            lambda q, k, v, k_shared, bar: jax.vjp(through_cudnn, q, k, v, k_shared)[1](bar), inputs[:5]
        ),
    }
    return Problem(
        f"attention gradients {batch} x {length}, {heads} heads",
        functools.partial(make, batch, length, heads),
        contenders,
        flops=operations(batch, length, heads, 3 * (OWN + SHARED) + 2 * VALUE),
    )


def make(batch: int, length: int, heads: int, key: jax.Array) -> dict[str, Any]:
    widths = {"q": OWN + SHARED, "k": OWN, "v": VALUE, "bar": VALUE}
    keys = jax.random.split(key, len(widths) + 1)
    inputs: dict[str, Any] = {
        name: jax.random.normal(k, (batch, length, heads, width), jnp.bfloat16)
        for (name, width), k in zip(widths.items(), keys, strict=False)
    }
    inputs["k_shared"] = jax.random.normal(keys[-1], (batch, length, SHARED), jnp.bfloat16)
    inputs["log_sums"] = jnp.broadcast_to(jnp.log(jnp.arange(1.0, length + 1)), (batch, heads, length))
    inputs["mean"] = jnp.zeros((batch, heads, length))
    return inputs


def through_cudnn(q, k, v, k_shared):
    return cudnn.attention(Operands(q, k, v, k_shared, None), SCALE, True)


def torch_cases(batch: int, length: int, heads: int) -> Iterator[Case]:
    for backend, padded in (("CUDNN_ATTENTION", False), ("FLASH_ATTENTION", True)):
        name = f"attention {batch} x {length}, {heads} heads: torch {backend.lower()}{', padded' * padded}"
        for gradients in (False, True):
            title = name + ", with gradients" * gradients
            yield Case(title, functools.partial(torch_attention, batch, length, heads, backend, padded, gradients))


def torch_attention(batch: int, length: int, heads: int, backend: str, padded: bool, gradients: bool) -> dict[str, Any]:
    """Times PyTorch's attention on [batch, heads, positions, width], its own order."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch_timing import milliseconds, random

    value = OWN + SHARED if padded else VALUE
    q, k, v, bar = (random(batch, heads, length, width) for width in (OWN + SHARED, OWN + SHARED, value, value))
    for x in (q, k, v):
        x.requires_grad_(gradients)

    def call():
        with sdpa_kernel(getattr(SDPBackend, backend)):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE)
        return torch.autograd.grad(out, (q, k, v), bar) if gradients else out

    ms, spread = milliseconds([call])
    widths = OWN + SHARED + VALUE + (3 * (OWN + SHARED) + 2 * VALUE) * gradients
    return {"passed": True, "ms": ms, "spread": spread, "tflops": operations(batch, length, heads, widths) * 1e-9 / ms}
