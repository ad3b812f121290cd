"""Loads a checkpoint over eight simulated devices and on one, and prints whether they are equal, as JSON."""

from __future__ import annotations

import json
import sys

import numpy as np

from dsv3_jax.interop import load_hf
from dsv3_jax.interop.parameter_tree import arrays, shardings
from dsv3_jax.sharding.mesh import MeshConfig, make_mesh
from dsv3_jax.sharding.on_mesh import OnMesh

alone = {path: np.asarray(value) for path, value in arrays(load_hf(sys.argv[1])).items()}
results = {}
for text in sys.argv[2:]:
    model = load_hf(sys.argv[1], devices=OnMesh(make_mesh(MeshConfig.parse(text))))
    sharded, wanted = arrays(model), shardings(model)
    parts = {path: value.addressable_shards[0].data.size / value.size for path, value in sharded.items()}
    results[text] = {
        "equal": all(np.array_equal(alone[path], np.asarray(value)) for path, value in sharded.items()),
        "as_the_model_keeps_them": all(value.sharding == wanted[path] for path, value in sharded.items()),
        "experts": parts["moe_blocks.feed_forward.experts.down"],
        "head": parts["head.weight"],
    }
print(json.dumps(results))
