"""Run with eight simulated devices: a checkpoint loaded over a mesh is the checkpoint loaded on one device."""

from __future__ import annotations

import json
import sys

import jax
import numpy as np

from dsv3_jax.interop import load_hf
from dsv3_jax.interop.parameter_tree import arrays

mesh = jax.make_mesh((2, 4), ("data", "expert"))
alone, spread = arrays(load_hf(sys.argv[1])), arrays(load_hf(sys.argv[1], mesh=mesh))
equal = alone.keys() == spread.keys() and all(
    np.array_equal(np.asarray(alone[path]), np.asarray(spread[path])) for path in alone
)
parts = [x.addressable_shards[0].data.nbytes / x.nbytes for x in spread.values() if x.ndim > 1]
print(json.dumps({"equal": equal, "devices": len(mesh.devices.flat), "largest_part": max(parts)}))
