"""Computes on eight simulated devices with weights kept in FP8, and with these dequantized; prints errors as JSON."""

from __future__ import annotations

import json
import sys

import jax
import numpy as np
from jax.sharding import NamedSharding

from dsv3_jax.interop import load_hf
from dsv3_jax.precision import Precision
from dsv3_jax.sharding.mesh import MeshConfig, make_mesh
from dsv3_jax.sharding.on_mesh import OnMesh
from dsv3_jax.sharding.rules import batch_spec

folder, mesh_text, *recipes = sys.argv[1:]
mesh = make_mesh(MeshConfig.parse(mesh_text))
tokens = np.random.default_rng(0).integers(2, 256, (8, 16)).astype(np.int32)
errors = {}
for recipe in recipes:
    precision = Precision.preset(recipe)
    sharded = jax.device_put(tokens, NamedSharding(mesh, batch_spec()))
    kept, plain = (
        load_hf(folder, dtype="float32", precision=precision, keep_fp8=keep, devices=OnMesh(mesh))
        for keep in (True, False)
    )
    found, wanted = (np.asarray(jax.jit(lambda m, t: m(t).logits)(model, sharded)) for model in (kept, plain))
    errors[recipe] = float(np.abs(found - wanted).max() / np.std(wanted))
print(json.dumps(errors))
