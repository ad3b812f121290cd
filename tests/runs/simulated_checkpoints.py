"""Saves a checkpoint on one mesh of eight simulated devices and restores it on others. Prints JSON."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from small_models import small_model
from small_runs import assert_trees_equal, small_run

from dsv3_jax.data import Tokenizer
from dsv3_jax.data.tokenizer_training import byte_tokenizer
from dsv3_jax.runs.checkpoints import Checkpoints, restore
from dsv3_jax.runs.folder import RunFolder
from dsv3_jax.runs.saved_run import RunPosition, use_newest
from dsv3_jax.runs.starting_state import distributed_model, starting_state
from dsv3_jax.sharding.mesh import MeshConfig
from dsv3_jax.training.state_layout import StateLayout

SAVED = "fsdp=2,expert=2,tensor=2"
RESTORED = ("data=8", "stage=2,fsdp=2,expert=2", "")


def main(path: str) -> None:
    config = small_run()
    folder = RunFolder(Path(path))
    folder.path.mkdir()
    layout = StateLayout.of(MeshConfig.parse(SAVED))
    _, state = starting_state(config, layout, lambda devices: small_model(config.model, 0))
    random = np.random.default_rng(0)

    def drawn(leaf: jax.Array) -> jax.Array:
        return jax.device_put(random.standard_normal(leaf.shape).astype(leaf.dtype), leaf.sharding)

    state = dataclasses.replace(state, optimizer=jax.tree.map(drawn, state.optimizer))
    checkpoints = Checkpoints(folder, Tokenizer(byte_tokenizer()), keep=1)
    checkpoints.save(state, RunPosition(3, 96, {"rows_taken": 12}), config)
    checkpoints.close()
    saved = use_newest(folder, print, lambda saved: saved)
    assert saved is not None
    assert saved.position == RunPosition(3, 96, {"rows_taken": 12})
    results = {}
    for text in RESTORED:
        layout = StateLayout.of(MeshConfig.parse(text)) if text else StateLayout()
        make = functools.partial(distributed_model, config, layout)
        _, restored = restore(folder.checkpoints / "00000003", config, make, layout)
        assert_trees_equal(state, restored)
        first = jax.tree.leaves(restored.params)[0]
        results[text] = {"devices": len(first.sharding.device_set), "layout": _layouts_agree(restored, layout)}
    print(json.dumps(results))


def _layouts_agree(state: Any, layout: StateLayout) -> bool:
    wanted = jax.tree.leaves(layout.of_state(state))
    return all(
        leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        for leaf, sharding in zip(jax.tree.leaves(state), wanted, strict=True)
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
