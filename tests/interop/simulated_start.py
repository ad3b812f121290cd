"""Starts runs on a mesh of eight simulated devices and on one, and prints whether their states are equal, as JSON."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsv3_jax.data import DataConfig
from dsv3_jax.runs.starting_point import architecture_of_source, load_starting_point
from dsv3_jax.runs.starting_state import starting_state
from dsv3_jax.sharding.mesh import MeshConfig
from dsv3_jax.training.config import RunConfig, TrainingConfig
from dsv3_jax.training.state_layout import StateLayout


def start(source: Path, layout: StateLayout) -> Any:
    model = architecture_of_source(source)
    data = DataConfig(vocab_size=model.vocab_size, sequence_length=16)
    config = RunConfig(preset="", model=model, data=data, training=TrainingConfig())
    _, state = starting_state(config, layout, functools.partial(load_starting_point, source, config))
    return dataclasses.replace(state, key=jax.random.key_data(state.key))


def donated(state: Any) -> Any:
    """The state after a step that changes nothing and may reuse its memory, as a training step may."""
    return jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 0, state), donate_argnums=0)(state)


results = {}
for text in sys.argv[1:]:
    layout = StateLayout.of(MeshConfig.parse("data=2,fsdp=2,expert=2"))
    one, sharded = start(Path(text), StateLayout()), start(Path(text), layout)
    wanted = jax.tree.leaves(layout.of_state(sharded))
    as_wanted = [x.sharding.is_equivalent_to(s, x.ndim) for x, s in zip(jax.tree.leaves(sharded), wanted, strict=True)]
    first = [np.asarray(leaf) for leaf in jax.tree.leaves(one)]
    equal = [np.array_equal(a, np.asarray(b)) for a, b in zip(first, jax.tree.leaves(sharded), strict=True)]
    after = [np.array_equal(a, np.asarray(b)) for a, b in zip(first, jax.tree.leaves(donated(sharded)), strict=True)]
    results[text] = {
        "equal": all(equal),
        "sharded_as_the_layout_says": all(as_wanted),
        "equal_when_donated": all(after),
    }
print(json.dumps(results))
