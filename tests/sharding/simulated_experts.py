"""Compares a MoE layer whose experts are on eight simulated devices with one device. Prints JSON."""

from __future__ import annotations

import json
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.config import ModelConfig
from dsv3_jax.modules.devices import Devices, OneDevice
from dsv3_jax.modules.moe import MixtureOfExperts
from dsv3_jax.precision import Precision
from dsv3_jax.sharding import expert_layout
from dsv3_jax.sharding.expert_parallel import ExpertExchange
from dsv3_jax.sharding.mesh import MeshConfig, make_mesh
from dsv3_jax.sharding.on_mesh import OnMesh
from dsv3_jax.sharding.rules import BATCH_AXES, shardings

# Rows have one whole tile and a part of one; there are four experts per group, and a token reaches two of four groups.
CONFIG = ModelConfig.preset("tiny", hidden_size=160, n_routed_experts=16, num_experts_per_tok=4)
# Each mesh, with options of the devices.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "two hops, ragged": ("expert=8", {}),
    "ranks with two groups, in stages": ("fsdp=2,expert=2,tensor=2", {"overlap": True}),
}


def new_layer(devices: Devices) -> MixtureOfExperts:
    layer = MixtureOfExperts(
        CONFIG, dtype=jnp.dtype("float32"), precision=Precision.preset("float32"), devices=devices, rngs=nnx.Rngs(0)
    )
    layer.router.bias[...] = jnp.arange(CONFIG.n_routed_experts) * 0.05  # an uneven load
    return layer


def compute(mesh: Any, u: Any, changes: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Returns output, load, and gradients of weights and input."""
    layer = new_layer(OneDevice() if mesh is None else OnMesh(mesh, **changes))
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


def ragged_all_to_all(
    rows: Any,
    buffer: Any,
    starts: Any,
    sizes: Any,
    there: Any,
    arriving: Any,
    *,
    axis_name: str,
    axis_index_groups: Any,
) -> Any:
    """Does what JAX documents of `lax.ragged_all_to_all`, which CPUs lack; returns NaN for contradictory sizes."""
    groups = axis_index_groups or [list(range(lax.axis_size(axis_name)))]
    index = {rank: group.index(rank) for group in groups for rank in group}
    me = jnp.array([index[rank] for rank in range(len(index))])[lax.axis_index(axis_name)]
    # From every sender: its rows, and for each receiver the index of their first, their number, and its index there.
    rows, starts, sizes, there = [
        lax.all_gather(x, axis_name, axis_index_groups=axis_index_groups) for x in (rows, starts, sizes, there)
    ]
    at = jnp.arange(rows.shape[1])
    targets = jnp.where(at < sizes[:, me, None], there[:, me, None] + at, buffer.shape[0])
    sent = jnp.take_along_axis(rows, jnp.minimum(starts[:, me, None] + at, len(at) - 1)[:, :, None], axis=1)
    buffer = buffer.at[targets].set(sent, mode="drop")
    return jnp.where(jnp.all(arriving == sizes[:, me]), buffer, jnp.nan)


def distance(a: Any, b: Any) -> float:
    a, b = np.asarray(a), np.asarray(b)
    return float(np.max(np.abs(a - b)) / np.max(np.abs(a)))


def main() -> None:
    u = np.random.default_rng(0).standard_normal((8, 24, CONFIG.hidden_size)).astype(np.float32)
    y, load, gradients = compute(None, u, {})
    results = {}
    for name, (mesh, changes) in CASES.items():
        ragged = "ragged" in name
        with (
            mock.patch.object(ExpertExchange, "_ragged", ragged),
            mock.patch.object(lax, "ragged_all_to_all", ragged_all_to_all),
            mock.patch.object(expert_layout, "SPARE", 0.3),  # most tokens need further rounds
            mock.patch.object(expert_layout, "_FEWEST_ROWS", 1),
        ):
            other, other_load, others = compute(make_mesh(MeshConfig.parse(mesh)), u, changes)
        results[name] = {
            "output": distance(y, other),
            "load": bool((np.asarray(load) == np.asarray(other_load)).all()),
            "gradient": max(map(distance, jax.tree.leaves(gradients), jax.tree.leaves(others))),
            "uneven": int(np.max(np.asarray(load))) / float(np.mean(np.asarray(load))),
        }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
