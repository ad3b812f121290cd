"""On eight simulated devices: a MoE layer with its experts spread out, beside one device. Prints JSON."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.config import ModelConfig
from dsv3_jax.modules.moe import MixtureOfExperts
from dsv3_jax.precision import Precision
from dsv3_jax.sharding.expert_parallel import ExpertExchange, GateOnRanks
from dsv3_jax.sharding.mesh import MeshConfig, make_mesh
from dsv3_jax.sharding.rules import BATCH_AXES, shardings

MESHES = ("data=2,expert=4", "fsdp=2,expert=2,tensor=2")
CONFIG = ModelConfig.preset("tiny")


def compute(mesh: Any, u: Any) -> tuple[Any, Any, Any]:
    """Output, load, and gradients of weights and input."""
    layer = MixtureOfExperts(
        CONFIG, dtype=jnp.dtype("float32"), precision=Precision.preset("float32"), rngs=nnx.Rngs(0)
    )
    layer.router.bias[...] = jnp.arange(CONFIG.n_routed_experts) * 0.05  # an uneven load
    if mesh is not None:
        layer.router.gate = GateOnRanks(mesh)
        layer.experts.exchange = ExpertExchange(mesh)
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    params = jax.tree.map(lambda leaf: 10 * leaf, params)
    if mesh is not None:
        params = jax.device_put(params, shardings(params, mesh))
        u = jax.device_put(u, NamedSharding(mesh, PartitionSpec(BATCH_AXES)))

    def loss(params: Any, u: Any) -> Any:
        y, routing = nnx.merge(graph, params, rest)(u)
        return jnp.sum(y**2) + routing.sequence_balance, (y, routing.load)

    (_, (y, load)), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, u)
    return y, load, gradients


def distance(a: Any, b: Any) -> float:
    a, b = np.asarray(a), np.asarray(b)
    return float(np.max(np.abs(a - b)) / np.max(np.abs(a)))


def main() -> None:
    u = np.random.default_rng(0).standard_normal((8, 24, CONFIG.hidden_size)).astype(np.float32)
    y, load, gradients = compute(None, u)
    results = {}
    for text in MESHES:
        other, other_load, others = compute(make_mesh(MeshConfig.parse(text)), u)
        results[text] = {
            "output": distance(y, other),
            "load": bool((np.asarray(load) == np.asarray(other_load)).all()),
            "gradient": max(map(distance, jax.tree.leaves(gradients), jax.tree.leaves(others))),
            "uneven": int(np.max(np.asarray(load))) / float(np.mean(np.asarray(load))),
        }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
