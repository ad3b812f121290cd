"""Computes attention in tiles, sequences and heads sharded over a mesh, on eight simulated devices. Prints JSON."""

from __future__ import annotations

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.modules.attention_core import CoreAttention
from dsv3_jax.modules.devices import OneDevice
from dsv3_jax.modules.linear import Linear
from dsv3_jax.modules.tiled_attention import tiled_attention
from dsv3_jax.precision import AttendedRows, KeptOutput, Precision
from dsv3_jax.sharding.attention_on_ranks import attend_on_ranks
from dsv3_jax.sharding.mesh import MeshConfig, make_mesh
from dsv3_jax.sharding.on_mesh import OnMesh

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
    found = {"collectives": collectives, "largest difference": difference, "on ranks": on_ranks(mesh)}
    print(json.dumps(found | {"kept on ranks": kept_on_ranks(mesh)}))


def on_ranks(mesh) -> float:
    """Returns the largest difference of results and gradients between a rank's program on all ranks and one device."""
    rng = np.random.default_rng(1)
    q, k, v, do, shared = (
        jnp.asarray(rng.normal(size=size), jnp.float32)
        for size in ((4, 20, 4, 8), (4, 20, 4, 5), (4, 20, 4, 6), (4, 20, 4, 6), (4, 20, 3))
    )
    attention = CoreAttention(0.3, "scan", None)
    there = functools.partial(attend_on_ranks, mesh, attention)

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(function):
        out, back = jax.vjp(lambda *x: function(*x, None), q, k, v, shared)
        return out, *back(do)

    pairs = zip(gradients(there), gradients(attention), strict=True)
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)


class Keeping(CoreAttention):
    """Keeps its output as kernels do, which this machine cannot run."""

    def __call__(self, *arrays, to_linear=True):
        assert to_linear
        assert self.kept is not None
        out, packed, _ = self.kept.keep(super().__call__(*arrays), jnp.zeros(()))
        return AttendedRows(out, packed)


class OnRanks(OnMesh):
    """Attends on every rank, as where there is a kernel."""

    def attend(self, *arguments):
        return attend_on_ranks(self.mesh, *arguments)


def kept_on_ranks(mesh) -> float:
    """Returns the same for attention that keeps its output in E5M6, and the linear map behind it in FP8.

    Differences are over the norms of the arrays: where sums in another order move a number to the next one of FP8, a
    single element changes much.
    """
    rng = np.random.default_rng(2)
    inputs = [
        jnp.asarray(rng.normal(size=size), jnp.float32)
        for size in ((4, 20, 4, 8), (4, 20, 4, 5), (4, 20, 4, 128), (4, 20, 3), (128, 4, 128))
    ]
    attention = Keeping(0.3, "scan", KeptOutput(packs=True))
    precision = Precision.preset("fp8,compute_dtype=float32,weight_gradient=none")
    make = {"scale": 1.0, "dtype": jnp.dtype(jnp.float32), "precision": precision}

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(devices):
        def layer(q, k, v, shared, weight):
            o = Linear(
                128, (4, 128), ("embed", "wide", None), after_attention=True, devices=devices, rngs=nnx.Rngs(0), **make
            )
            o.weight[...] = weight
            return o(devices.attend(attention, q, k, v, shared, None))

        out, back = jax.vjp(layer, *inputs)
        return out, *back(jnp.sin(out))

    pairs = zip(gradients(OnRanks(mesh)), gradients(OneDevice()), strict=True)
    return max(float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(b)) for a, b in pairs)


if __name__ == "__main__":
    main()
