"""Compares MoE layers inside the stages of a pipeline, on eight simulated devices, with one device. Prints JSON.

Two stages have one layer each. By `lax.cond` only one of them exchanges tokens, and the other need not wait for it.
"""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.config import ModelConfig
from dsv3_jax.modules.devices import OneDevice
from dsv3_jax.modules.moe import MixtureOfExperts
from dsv3_jax.precision import Precision
from dsv3_jax.sharding.mesh import MeshConfig, make_mesh
from dsv3_jax.sharding.on_mesh import OnMesh
from dsv3_jax.sharding.rules import BATCH_AXES

CONFIG = ModelConfig.preset("tiny")
STAGES = 2


def new_layer(mesh: Any = None) -> Any:
    layer = MixtureOfExperts(
        CONFIG,
        dtype=jnp.dtype("float32"),
        precision=Precision.preset("float32"),
        devices=OneDevice() if mesh is None else OnMesh(mesh, overlap=True),
        rngs=nnx.Rngs(0),
    )
    layer.router.bias[...] = jnp.arange(CONFIG.n_routed_experts) * 0.05  # an uneven load
    return nnx.split(layer, nnx.Param, ...)


def first(apply: Any, params: Any, u: Any) -> tuple[Any, Any]:
    y, routing = apply(params, u)
    return u + y, routing.load


def second(apply: Any, params: Any, u: Any) -> tuple[Any, Any]:
    del apply
    return u @ params["router"]["weight"].T @ params["router"]["weight"], jnp.zeros(CONFIG.n_routed_experts, jnp.int32)


def on_one_device(params: Any, u: Any) -> tuple[Any, Any]:
    graph, _, rest = new_layer()

    def apply(params: Any, u: Any) -> Any:
        return nnx.merge(graph, params, rest)(u)

    found = [
        stage(apply, jax.tree.map(lambda leaf, i=i: leaf[i], params), u[i]) for i, stage in enumerate((first, second))
    ]
    y, load = (jnp.stack(part) for part in zip(*found, strict=True))
    return jnp.sum(y**2), (y, load)


def on_stages(mesh: Any, params: Any, u: Any) -> tuple[Any, Any]:
    graph, _, rest = new_layer(mesh)

    def apply(params: Any, u: Any) -> Any:
        return nnx.merge(graph, params, rest)(u)

    def stage(params: Any, u: Any) -> Any:
        own = jax.tree.map(lambda leaf: leaf[0], params)
        y, load = lax.cond(
            lax.axis_index("stage") == 0, lambda *x: first(apply, *x), lambda *x: second(apply, *x), own, u[0]
        )
        return y[None], load[None]

    y, load = jax.shard_map(
        stage,
        mesh=mesh,
        in_specs=PartitionSpec("stage"),
        out_specs=PartitionSpec("stage"),
        axis_names={"stage"},
        check_vma=False,
    )(params, u)
    return jnp.sum(y**2), (y, load)


def distance(a: Any, b: Any) -> float:
    a, b = np.asarray(a), np.asarray(b)
    return float(np.max(np.abs(a - b)) / np.max(np.abs(a)))


def main() -> None:
    random = np.random.default_rng(0)
    u = random.standard_normal((STAGES, 8, 12, CONFIG.hidden_size)).astype(np.float32)
    _, params, _ = new_layer()
    params = jax.tree.map(lambda leaf: 0.06 * random.standard_normal((STAGES, *leaf.shape)).astype(np.float32), params)

    def compute(loss: Any, params: Any, u: Any) -> Any:
        (_, aux), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, u)
        return *aux, gradients

    y, load, gradients = compute(on_one_device, params, u)
    mesh = make_mesh(MeshConfig.parse("stage=2,data=2,expert=2"))
    placed = jax.device_put(u, NamedSharding(mesh, PartitionSpec("stage", BATCH_AXES)))
    staged = jax.device_put(params, NamedSharding(mesh, PartitionSpec("stage")))
    other, other_load, others = compute(lambda *x: on_stages(mesh, *x), staged, placed)
    print(
        json.dumps(
            {
                "output": distance(y, other),
                "load": bool((np.asarray(load) == np.asarray(other_load)).all()),
                "gradient": max(map(distance, jax.tree.leaves(gradients), jax.tree.leaves(others))),
            }
        )
    )


if __name__ == "__main__":
    main()
