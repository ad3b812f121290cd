"""Checks gradients on the GPU against the same computation on the CPU, where the references run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import BFLOAT16, FLOAT32_SUM, Case, error_case, normal
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

import pallas_kernels as pk
from dsv3_jax.precision.fp8_layer import fp8_product
from dsv3_jax.precision.fp8_recipe import Fp8Recipe, Role

# SwiGLU is quantised after exponentials that differ in their last bit, so that some values are rounded to a neighbour.
REQUANTISED = 4e-3


def cases(tiny: bool) -> Iterator[Case]:
    tokens = 40 if tiny else 600
    yield gate(
        "V3", tokens, 256, {"num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5}
    )
    yield gate("V2-Lite", tokens, 64, {"num_experts_per_tok": 6, "scoring_func": "softmax", "norm_topk_prob": False})
    yield grouped_product(tiny)
    for rows, width in ((40, 256),) if tiny else ((1000, 7168), (4096, 1536)):
        yield rms_norm(rows, width)
    rows, out, width = (128, 128, 128) if tiny else (1536, 2112, 1024)
    for name, role in (
        ("plain", Role()),
        ("after attention", Role(after_attention=True)),
        ("SwiGLU", Role(swiglu=True)),
        ("dispatched", Role(dispatched=True, gradient_dispatched=True)),
    ):
        for groups in (0, 3) if name != "after attention" else (0,):
            if not tiny or (name == "plain" and not groups):
                yield fp8_map(f"FP8 map, {name}{', per expert' * (groups > 0)}", role, groups, rows, out, width)


def gate(name: str, tokens: int, experts: int, settings: dict) -> Case:
    """Returns the gradient to the logits through gates and mean affinities."""
    inputs = tuple(np.random.default_rng(i).standard_normal((2, tokens, experts), "f4") for i in range(1))
    to_gate = np.random.default_rng(7).standard_normal((2, tokens, settings["num_experts_per_tok"]), "f4")
    to_mean = np.random.default_rng(8).standard_normal((2, experts), "f4") * np.float32(tokens)

    def gradient(logits):
        def loss(logits):
            gates = pk.gate(logits, None, **settings)
            return jnp.sum(gates.gate * to_gate) + jnp.sum(gates.affinity_mean * to_mean)

        return jax.grad(loss)(logits)

    return error_case(f"gate of {name}", gradient, inputs, lambda: on_cpu(gradient, inputs), FLOAT32_SUM)


def grouped_product(tiny: bool) -> Case:
    """Returns both gradients of the bfloat16 product over groups, against float64."""
    rows, out, width, sizes = (300, 80, 144, (100, 0, 150)) if tiny else (2000, 1152, 1088, (700, 0, 1200))
    x, w, bar = normal(rows, width), normal(len(sizes), out, width, seed=1), normal(rows, out, seed=2)

    def gradients(x, w, bar, sizes):
        return jax.vjp(lambda x, w: pk.grouped_matmul(x, w, sizes), x, w)[1](bar)

    def wanted():
        to_x, to_w, start = np.zeros((rows, width)), np.zeros(w.shape), 0
        for group, size in enumerate(sizes):
            mine = slice(start, start + size)
            to_x[mine] = bar[mine].astype("f8") @ w[group].astype("f8")
            to_w[group] = bar[mine].astype("f8").T @ x[mine].astype("f8")
            start += size
        return to_x, to_w

    return error_case("grouped_matmul bf16", gradients, (x, w, bar, np.asarray(sizes, "i4")), wanted, BFLOAT16)


def rms_norm(rows: int, width: int, epsilon: float = 1e-6) -> Case:
    """Returns normed rows and both gradients against float64, and by how much their FP8 differs from `quantize`'s."""
    x, bar = normal(rows, width), normal(rows, width, seed=2)
    weight = 1 + 0.3 * normal(width, seed=1, dtype="float32")

    def function(x, weight, bar):
        tiles, reciprocal, normed = pk.quantize_rms_norm(x, weight, epsilon=epsilon, with_rows=True)
        again = pk.quantize(normed, tile="1x128")
        apart = tiles.values.astype(jnp.float32) - again.values.astype(jnp.float32), tiles.scales - again.scales
        return apart, normed, pk.rms_norm_gradient(x, weight, reciprocal, bar, plus=x)

    def wanted():
        reciprocal = 1 / np.sqrt(np.mean(np.square(x.astype("f8")), axis=1, keepdims=True) + epsilon)
        scaled, bars = x.astype("f8") * reciprocal, bar.astype("f8")
        mean = np.mean(bars * weight * scaled, axis=1, keepdims=True)
        nothing = np.zeros((rows, width), "f4"), np.zeros((rows, width // 128), "f4")
        x_bar = reciprocal * (bars * weight - scaled * mean) + x.astype("f8")
        return nothing, scaled * weight, (x_bar, np.sum(bars * scaled, axis=0))

    limits = ((0, 0), BFLOAT16, (BFLOAT16, FLOAT32_SUM))
    return error_case(f"RMSNorm, {rows} x {width}", function, (x, weight, bar), wanted, limits)


def fp8_map(name: str, role: Role, groups: int, rows: int, out: int, width: int) -> Case:
    """Returns the linear map of the model in FP8 with its gradients to input and weight."""
    recipe = Fp8Recipe()
    x = normal(rows, 2 * width if role.swiglu else width)
    w, bar = normal(*((groups,) if groups else ()), out, width, seed=1, dtype="float32"), normal(rows, out, seed=2)
    sizes = np.asarray([rows // 3 // 128 * 128, 0, rows // 3 // 128 * 128], "i4") if groups else None

    def function(x, w, bar, sizes):
        y, pull = jax.vjp(lambda x, w: fp8_product(x, w, sizes, recipe, role), x, w)
        return y, *pull(bar)

    inputs = (x, w, bar, sizes)
    tolerance = REQUANTISED if role.swiglu else BFLOAT16 * 1.5  # both sides round to bfloat16
    return error_case(name, function, inputs, lambda: on_cpu(function, inputs), tolerance)


def on_cpu(function: Callable[..., Any], inputs: tuple) -> Any:
    """Returns `function` computed on the CPU, where public functions run their references."""
    cpu = jax.devices("cpu")[0]
    with contextlib.ExitStack() as stack:
        device = AbstractDevice(device_kind="cpu", num_cores=None, platform="cpu")
        stack.enter_context(use_abstract_mesh(AbstractMesh((), (), abstract_device=device)))
        stack.enter_context(jax.default_device(cpu))
        return jax.device_get(function(*jax.device_put(inputs, cpu)))
