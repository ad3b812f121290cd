"""Gathers weights over eight simulated fsdp ranks in FP8 and compares with quantizing whole ones. Prints JSON."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

import pallas_kernels
from dsv3_jax.planning.collectives import read_collectives
from dsv3_jax.sharding.fsdp_gather import gather_over_fsdp
from dsv3_jax.sharding.mesh import MeshConfig, make_mesh

RANKS = 8
# Shape, sharded dimension, axes of the inputs and of stacked matrices: whole blocks; blocks of 7168 / 32 = 224 columns
# that two ranks share, or of 1792 / 8 rows; less than a block on a rank; odd sizes, where parts have 1 and 3 columns.
CASES = {
    "whole": ((256, 1024), 1, 1, 0),
    "columns": ((130, 1792), 1, 1, 0),
    "rows": ((1792, 4, 8), 0, 2, 0),
    "small": ((3, 2, 96, 128), 3, 1, 1),
    "down": ((3, 96, 64), 1, 1, 1),
    "odd": ((5, 24), 1, 1, 0),
    "one": ((5, 8), 1, 1, 0),
}


def case(shape: tuple[int, ...], axis: int, in_axes: int, stacked: int) -> dict[str, Any]:
    mesh = make_mesh(MeshConfig(fsdp=RANKS))
    random = np.random.default_rng(0)
    weight = random.standard_normal(shape).astype(np.float32) * np.exp(random.standard_normal(shape)).astype(np.float32)
    weight[..., 0, 0] = np.nan if stacked else 0.0
    bars = random.standard_normal((RANKS, *shape)).astype(np.float32)
    spec = PartitionSpec(*["fsdp" if i == axis else None for i in range(len(shape))])

    def on_a_rank(shard: jax.Array, bar: jax.Array) -> Any:
        def gather(shard: jax.Array) -> Any:
            found = gather_over_fsdp(shard, axis, jnp.dtype(jnp.float8_e4m3fn), in_axes=in_axes, stacked=stacked)
            return found.gradient, found

        _, pull, found = jax.vjp(gather, shard, has_aux=True)
        return found.values, found.scales, pull(bar[0])[0]

    run = jax.jit(
        jax.shard_map(
            on_a_rank,
            mesh=mesh,
            in_specs=(spec, PartitionSpec("fsdp")),
            out_specs=(PartitionSpec(), PartitionSpec(), spec),
            check_vma=False,
        )
    )
    values, scales, gradient = run(weight, bars)
    matrix = weight.reshape(*shape[:stacked], -1, int(np.prod(shape[len(shape) - in_axes :])))
    whole = pallas_kernels.quantize(jnp.asarray(matrix), tile="128x128", implementation="reference")
    wanted = np.sum(bars, axis=0, dtype=np.float64)
    sent = sum(
        item.sent for item in read_collectives(run.lower(weight, bars).compile().as_text()) if item.kind == "all-gather"
    )
    return {
        "values": bool(
            (np.asarray(values).view(np.uint8) == np.asarray(whole.values).view(np.uint8).reshape(shape)).all()
        ),
        "scales": bool(np.array_equal(scales, whole.scales, equal_nan=True)),
        "gradient": float(np.abs(np.asarray(gradient) - wanted).max()),
        "sent": sent / ((1 - 1 / RANKS) * 4 * weight.size),
    }


if __name__ == "__main__":
    print(json.dumps({name: case(*arguments) for name, arguments in CASES.items()}))
