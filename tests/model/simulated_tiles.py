"""Computes attention in tiles, sequences and heads sharded over a mesh, on eight simulated devices. Prints JSON."""

from __future__ import annotations

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.modules.tiled_attention import tiled_attention
from dsv3_jax.sharding.mesh import MeshConfig, make_mesh

LENGTH, CHUNK = 45, 16


def both(q, k, v, do, ids):
    out, back = jax.vjp(lambda q, k, v: tiled_attention(q, k, v, ids, 0.3, CHUNK), q, k, v)
    return out, *back(do)


def main() -> None:
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=(4, LENGTH, 4, width)), jnp.float32) for width in (8, 8, 5, 5)]
    ids = jnp.asarray(np.sort(rng.integers(0, 4, size=(4, LENGTH)), axis=1))
    alone = jax.jit(both)(*arrays, ids)
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))
    rows = ("data", "fsdp", "expert")
    by_head = NamedSharding(mesh, PartitionSpec(rows, None, "tensor"))
    spread = [jax.device_put(x, by_head) for x in arrays]
    ids = jax.device_put(ids, NamedSharding(mesh, PartitionSpec(rows)))
    compiled = jax.jit(both, out_shardings=by_head).lower(*spread, ids).compile()
    program = compiled.as_text() or ""
    collectives = re.findall(r"= \S+ (all-\S+|reduce-scatter|collective-permute)\(", program)
    pairs = zip(alone, compiled(*spread, ids), strict=True)
    difference = max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)
    print(json.dumps({"collectives": collectives, "largest difference": difference}))


if __name__ == "__main__":
    main()
