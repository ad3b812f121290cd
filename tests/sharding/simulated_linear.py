"""Compares FP8 linear maps on eight simulated devices with one device: gradients and operations. Prints JSON.

An RMSNorm is in front of them, which quantizes its output in widths that are multiples of 128.

Every rank has whole tiles of 128 tokens of a sequence, and every shard along a tensor axis whole tiles of the inputs,
so that the FP8 numbers are those of one device.
"""

from __future__ import annotations

import functools
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.modules.devices import Devices, OneDevice
from dsv3_jax.modules.feed_forward import FeedForward
from dsv3_jax.modules.norm import RMSNorm
from dsv3_jax.precision import Precision
from dsv3_jax.sharding.mesh import MeshConfig, make_mesh
from dsv3_jax.sharding.on_mesh import OnMesh
from dsv3_jax.sharding.rules import BATCH_AXES, WITHIN_A_STAGE, shardings

ROWS, LENGTH, WIDTH = 4, 256, 256


class Normed(nnx.Module):
    """A feed-forward network behind an RMSNorm."""

    def __init__(self, hidden: int, recipe: str, devices: Devices = OneDevice()):
        dtype = jnp.dtype(jnp.float32)
        self.norm = RMSNorm(hidden, 1e-6, dtype=dtype)
        make: dict[str, Any] = {"precision": Precision.preset(recipe), "devices": devices, "rngs": nnx.Rngs(0)}
        self.network = FeedForward(hidden, WIDTH, scale=0.1, dtype=dtype, **make)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.network(self.norm.before_linear(x, self.network.gate_up))


def loss(graph: Any, params: nnx.State, x: jax.Array, slope: jax.Array) -> tuple[jax.Array, jax.Array]:
    y = nnx.merge(graph, params)(x)
    return jnp.sum((y * slope).astype(jnp.float32)), y


def compute(module: Normed, hidden: int, shard: Any = lambda params, x: (params, x)) -> tuple[list[np.ndarray], float]:
    """Returns the output and every gradient, and the operations of one device."""
    graph, params = nnx.split(module)
    random = np.random.default_rng(0)
    x, slope = (random.standard_normal((ROWS, LENGTH, hidden)).astype(np.float32) for _ in range(2))
    params, x = shard(params, x)
    gradient = jax.jit(jax.value_and_grad(functools.partial(loss, graph), argnums=(0, 1), has_aux=True))
    compiled = gradient.lower(params, x, slope).compile()
    (_, y), gradients = compiled(params, x, slope)
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves((y, gradients))], compiled.cost_analysis()["flops"]


def on_mesh(hidden: int, recipe: str, text: str) -> tuple[list[np.ndarray], float]:
    sizes = MeshConfig.parse(text)
    mesh = make_mesh(sizes, jax.devices()[: np.prod(list(sizes.sizes.values()))])
    module = Normed(hidden, recipe, OnMesh(mesh))

    def shard(params: nnx.State, x: np.ndarray) -> tuple[Any, Any]:
        batch = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
        return jax.device_put(params, shardings(params, mesh, WITHIN_A_STAGE)), jax.device_put(x, batch)

    return compute(module, hidden, shard)


def main(hidden: str, recipe: str, *meshes: str) -> None:
    one, work = compute(Normed(int(hidden), recipe), int(hidden))
    results = {}
    for text in meshes:
        other, work_there = on_mesh(int(hidden), recipe, text)
        apart = max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(one, other, strict=True))
        results[text] = {"apart": apart, "work": work_there / work}
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
