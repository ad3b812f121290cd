"""Compares a training step on each given mesh of simulated devices with one device. Prints JSON."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import jax
import numpy as np
from small_models import small_model
from small_runs import SETTINGS, batch_of_pairs, packed_batch, random_batch, small_run

from dsv3_jax import model as model_module
from dsv3_jax.pipeline.slots import moe_layers_of_stages
from dsv3_jax.runs.starting_state import starting_state
from dsv3_jax.sharding.mesh import MeshConfig
from dsv3_jax.training.config import LoraConfig, RunConfig, TeacherConfig
from dsv3_jax.training.distillation import Teacher
from dsv3_jax.training.state import TrainState
from dsv3_jax.training.state_layout import StateLayout
from dsv3_jax.training.step import make_train_step

model_module.MOST_UNROLLED_LAYERS = 1
RATE = float(SETTINGS.learning_rate)


def run_of(kind: str) -> RunConfig:
    """Returns a run of one MoE layer ("small"), also with an MTP module ("with_mtp"), of two in four passes ("staged"),
    or of four, one of them in the first stage ("uneven"). With an MTP module there are eight heads, for eight ranks.

    With "muon-" before it, the optimizer is Muon with QK-clip, which clips most heads. With "adapted-" before it,
    low-rank adapters are trained. With "masked-" before it, rows are packed samples of which only the answers are
    learned. With "taught-" before it, the loss is that of distillation from a wider model; with "pairs-", that of a
    reward model.
    """
    if kind.startswith("muon-"):
        run = run_of(kind.removeprefix("muon-"))
        return dataclasses.replace(
            run, training=dataclasses.replace(run.training, optimizer="muon", qk_clip=1e-4, weight_decay=0.0)
        )
    if kind.startswith("adapted-"):
        run = run_of(kind.removeprefix("adapted-"))
        training = dataclasses.replace(run.training, ema_decay=0.0)
        return dataclasses.replace(run, training=training, lora=LoraConfig(rank=2, targets="all", experts=True))
    if kind.startswith("taught-"):
        return dataclasses.replace(run_of(kind.removeprefix("taught-")), teacher=TeacherConfig(run="wide", top_k=5))
    if kind.startswith("pairs-"):
        run = run_of(kind.removeprefix("pairs-"))
        data = dataclasses.replace(run.data, form="preferences", isolate_documents=True)
        return dataclasses.replace(run, data=data)
    if kind.startswith("masked-"):
        run = run_of(kind.removeprefix("masked-"))
        return dataclasses.replace(run, data=dataclasses.replace(run.data, isolate_documents=True))
    if kind in ("staged", "uneven"):
        run = small_run(batch_size=16, micro_batch_size=4)
        dense, layers = (2, 6) if kind == "uneven" else (0, run.model.num_hidden_layers)
        changes = {"num_hidden_layers": layers, "first_k_dense_replace": dense, "num_nextn_predict_layers": 0}
        return dataclasses.replace(run, model=run.model.replace(**changes))
    run = small_run(batch_size=8, micro_batch_size=0, loss_chunk=32)
    mtp = int(kind == "with_mtp")
    changes = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "num_nextn_predict_layers": mtp}
    if mtp:
        changes["num_attention_heads"] = 8
    return dataclasses.replace(run, model=run.model.replace(**changes))


def teacher_on(config: RunConfig, layout: StateLayout) -> Teacher | None:
    """Returns the run's teacher, which is twice as wide as its model, on the layout's devices."""
    if not config.teacher.run:
        return None
    model = config.model.replace(hidden_size=2 * config.model.hidden_size, initializer_range=0.3)
    config = dataclasses.replace(config, model=model)
    skeleton, state = starting_state(config, layout, lambda devices: small_model(model, 1))
    return Teacher(skeleton, state.params, state.router_biases)


def step_on(config: RunConfig, layout: StateLayout) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Returns every leaf of the state after one step and of the metrics, by name, and the result of `divided`."""
    rows = config.training.rows_per_pass
    passes = config.training.batch_size // rows
    if config.data.form == "preferences":
        batch = [x.reshape(passes, rows, -1) for x in batch_of_pairs(0, passes * rows)]
    elif config.data.isolate_documents:
        batch = packed_batch(0, passes, rows)
    else:
        batch = random_batch(0, passes, rows, padded=True)
    batch = [np.asarray(x) for x in batch]
    skeleton, state = starting_state(config, layout, lambda devices: small_model(config.model, 0))
    biases = 0.05 * np.arange(state.router_biases.size, dtype=np.float32).reshape(state.router_biases.shape)
    state = dataclasses.replace(state, router_biases=jax.device_put(biases, state.router_biases.sharding))
    parts = divided(state)
    state, metrics = make_train_step(skeleton, config, layout, teacher_on(config, layout))(
        state, *map(layout.feed.put, batch), SETTINGS
    )
    leaves = jax.tree_util.tree_leaves_with_path((dataclasses.replace(state, key=0), metrics))
    return {jax.tree_util.keystr(path): np.asarray(leaf, np.float64) for path, leaf in leaves}, parts


def compare(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict[str, Any]:
    """Returns the largest difference of each quantity; gradients are read from Adam's first moment."""

    def relative(word: str) -> float:
        names = [name for name in one if word in name]
        assert names, word
        return max(float(np.abs(one[name] - other[name]).max() / (np.abs(one[name]).max() or 1)) for name in names)

    parameters = [name for name in one if ".params" in name or ".adapters" in name]
    updates = [float(np.sqrt(np.mean((one[name] - other[name]) ** 2))) / RATE for name in parameters]
    others = [relative(word) for word in (".momentum", ".largest_logit") if any(word in name for name in one)]
    load = next(value for name, value in one.items() if name.endswith(".load"))
    return {
        "loss": relative("[1].loss"),
        "gradient": max([relative(".mu"), *others]),
        "norm": relative(".gradient_norm"),
        "update": max(updates),
        "load": relative("[1].load"),
        "biases": relative(".router_biases"),
        "uneven": float(load.max() / load.mean()),
    }


def divided(state: TrainState) -> dict[str, float]:
    """Returns the fractions of parameters and of moments that a device holds."""

    def part(tree: Any) -> float:
        leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim > 1]
        return sum(leaf.addressable_shards[0].data.size for leaf in leaves) / sum(leaf.size for leaf in leaves)

    return {"parameters": part(state.params), "moments": part(state.optimizer)}


def main(kind: str, *meshes: str) -> None:
    config = run_of(kind)
    one, _ = step_on(config, StateLayout())
    results = {}
    for text in meshes:
        sizes = MeshConfig.parse(text)
        layers = moe_layers_of_stages(config.model, sizes.stage)
        layout = StateLayout.of(sizes, layers=layers, devices=jax.devices()[: np.prod(list(sizes.sizes.values()))])
        other, parts = step_on(config, layout)
        results[text] = compare(one, other) | parts
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
