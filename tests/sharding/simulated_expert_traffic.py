"""Counts what ranks of a layer's experts send to each other on eight simulated devices, by dtype. Prints JSON."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import Var, jaxprs_in_params
from jax.interpreters import partial_eval

from dsv3_jax.config import ModelConfig
from dsv3_jax.modules.devices import OneDevice
from dsv3_jax.modules.moe import MixtureOfExperts
from dsv3_jax.precision import Precision
from dsv3_jax.precision.tiles import dequantize, quantize
from dsv3_jax.sharding.expert_hops import Hop
from dsv3_jax.sharding.expert_parallel import ExpertExchange
from dsv3_jax.sharding.mesh import MeshConfig, make_mesh

# Rows have one whole tile and a part of one; there are four experts per group, and a token reaches two of four groups.
CONFIG = ModelConfig.preset("tiny", hidden_size=160, n_routed_experts=16, num_experts_per_tok=4)
GROUPS, IN_A_GROUP = CONFIG.n_group, CONFIG.n_routed_experts // CONFIG.n_group
# Weight gradients have tiles along the rows, whose order differs on several devices.
PRECISION = Precision.preset("fp8,compute_dtype=float32,weight_gradient=none")


def crossings(layer: MixtureOfExperts, gates: Any, u: Any, exchange: Any) -> dict[str, int]:
    """Counts the rows that are sent from one group of ranks to another, and how many the routing asks for."""
    counted: list[int] = []
    plainly = Hop.all_to_all

    def counting(hop: Hop, x: Any) -> Any:
        if hop.stride > 1 and x.shape[-1] == CONFIG.hidden_size:
            filled = jnp.any(x != 0, axis=-1).reshape(hop.peers, -1).sum(axis=-1)
            jax.debug.callback(lambda count: counted.append(int(count)), filled.sum() - filled[hop.index])
        return plainly(hop, x)

    def forward(u: Any, gates: Any) -> Any:
        weights = layer.experts.gate_up[...], layer.experts.down[...]
        return exchange(u, gates, *weights, lambda rows, *_: rows)

    with mock.patch.object(Hop, "all_to_all", counting):
        jax.block_until_ready(jax.jit(forward)(u, gates))
        jax.effects_barrier()
    group = np.asarray(gates.expert_index).reshape(-1, CONFIG.num_experts_per_tok) // IN_A_GROUP
    own = np.repeat(np.arange(GROUPS), len(group) // GROUPS)
    others = [set(row) - {home} for row, home in zip(group, own, strict=True)]
    return {
        "there and back": sum(counted),
        "asked for": 2 * sum(map(len, others)),
        "one row per expert": 2 * int((group != own[:, None]).sum()),
        "tokens": len(group),
    }


@jax.custom_vjp
def rounded_backward(y: Any) -> Any:
    """Returns `y`, with its gradient rounded as it is where it is sent to another rank."""
    return y


def round_gradient(_: None, bar: Any) -> tuple[Any]:
    return (dequantize(quantize(bar, (1, 128), "e4m3", power_of_two=True)),)


rounded_backward.defvjp(lambda y: (y, None), round_gradient)


def in_fp8(layer: MixtureOfExperts, gates: Any, u: Any, exchange: Any) -> dict[str, Any]:
    """Compares gradients with one device's, and counts the dtypes that all-to-alls send."""
    y_bar = jnp.asarray(np.random.default_rng(1).standard_normal(u.shape), jnp.float32)
    weights = 10 * layer.experts.gate_up[...], 10 * layer.experts.down[...]

    def gradients_of(apply: Callable[..., Any]) -> Callable[..., Any]:
        def loss(u: Any, weights: Any, gate: Any) -> Any:
            y = apply(u, dataclasses.replace(gates, gate=gate), *weights)
            return jnp.vdot(y, y_bar.astype(y.dtype)), y

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))

    def here(u: Any, gates: Any, gate_up: Any, down: Any) -> Any:
        experts = layer.experts
        return OneDevice().apply_experts(u, gates, gate_up, down, experts.networks, experts.shapes)

    there = gradients_of(lambda *x: exchange(*x, layer.experts.networks))
    found, one = (
        jax.tree.leaves(gradients(u, weights, gates.gate))
        for gradients in (there, gradients_of(lambda *x: rounded_backward(here(*x))))
    )
    moved: Counter[str] = Counter()
    count_all_to_alls(jax.make_jaxpr(there)(u, weights, gates.gate).jaxpr, moved)
    return {
        "apart": max(map(apart, one, found)),
        "rounding": apart(y_bar, *round_gradient(None, y_bar)),
        "moved": moved,
    }


def count_all_to_alls(jaxpr: Any, found: Counter[str]) -> None:
    """Adds to `found` how many all-to-alls have rows of the hidden size as operands, by dtype."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "all_to_all" and equation.invars[0].aval.shape[-1] == CONFIG.hidden_size:
            found[str(equation.invars[0].aval.dtype)] += 1
        for inner in jaxprs_in_params(equation.params):
            count_all_to_alls(inner, found)


def waits(layer: MixtureOfExperts, gates: Any, u: Any, exchange: Any) -> tuple[list[int], list[int]]:
    """Returns how many exchanges and products each exchange of rows waits for, outside of loops and inside."""
    weights = layer.experts.gate_up[...], layer.experts.down[...]

    def there_and_back(u: Any, weights: Any, y_bar: Any) -> Any:
        y, pull = jax.vjp(lambda u, weights: exchange(u, gates, *weights, layer.experts.networks), u, weights)
        return y, pull(y_bar)

    jaxpr = jax.make_jaxpr(there_and_back)(u, weights, u).jaxpr
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)  # as the compiler does
    outside: list[int] = []
    inside: list[int] = []
    waits_behind(jaxpr, [frozenset()] * len(jaxpr.invars), outside, inside)
    return outside, inside


def waits_behind(
    jaxpr: Any, inputs: list[frozenset[Any]], found: list[int], in_loops: list[int]
) -> list[frozenset[Any]]:
    """Returns the exchanges and products that each output depends on, given those of each input."""
    known = dict(zip(jaxpr.invars, inputs, strict=True))
    for equation in jaxpr.eqns:
        needed = [known.get(of, frozenset()) if isinstance(of, Var) else frozenset() for of in equation.invars]
        inner = list(jaxprs_in_params(equation.params))
        name, together = equation.primitive.name, frozenset().union(*needed)
        if name == "optimization_barrier":
            outputs = needed
        elif name == "scan":
            waits_behind(inner[0], [frozenset()] * len(needed), in_loops, in_loops)
            outputs = [together] * len(equation.outvars)
        elif len(inner) == 1 and len(inner[0].invars) == len(needed):
            outputs = waits_behind(inner[0], needed, found, in_loops)
        else:
            if name == "all_to_all" and jnp.issubdtype(equation.invars[0].aval.dtype, jnp.floating):
                found.append(len(together))
                together |= {object()}
            if name == "dot_general":
                together |= {object()}
            outputs = [together] * len(equation.outvars)
        known.update(zip(equation.outvars, outputs, strict=True))
    return [known.get(of, frozenset()) if isinstance(of, Var) else frozenset() for of in jaxpr.outvars]


def apart(a: Any, b: Any) -> float:
    a, b = np.asarray(a), np.asarray(b)
    return float(np.linalg.norm(a - b) / np.linalg.norm(a))


def main() -> None:
    layer, report = (
        MixtureOfExperts(CONFIG, dtype=jnp.dtype("float32"), precision=precision, rngs=nnx.Rngs(0))
        for precision in (PRECISION, Precision.preset("fp8,compute_dtype=float32"))
    )
    u = jnp.asarray(np.random.default_rng(0).standard_normal((8, 16, CONFIG.hidden_size)), jnp.float32)
    gates = layer.router(u)
    # The layer's recipe sends tokens in FP8; the first three results are of an exchange that sends them unrounded.
    in_fp8_format = ExpertExchange(make_mesh(MeshConfig(expert=8)), layer.experts.shapes)
    in_stages = dataclasses.replace(in_fp8_format, overlap=True)
    with_report = dataclasses.replace(in_stages, shapes=report.experts.shapes)
    exchange = dataclasses.replace(in_fp8_format, shapes=dataclasses.replace(layer.experts.shapes, fp8=None))
    flat = u.reshape(-1, CONFIG.hidden_size)
    results = {
        "crossings": crossings(layer, gates, flat, exchange),
        "stages": waits(layer, gates, flat, dataclasses.replace(exchange, overlap=True))[1],
        "whole": waits(layer, gates, flat, exchange)[0],
        "fp8": in_fp8(layer, gates, flat, in_fp8_format),
        "fp8 in stages": in_fp8(layer, gates, flat, in_stages)["apart"],
        "report's recipe in stages": in_fp8(report, gates, flat, with_report)["apart"],
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
