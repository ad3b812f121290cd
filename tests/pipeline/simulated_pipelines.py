"""Compares gradients and losses of a batch through pipelines on eight simulated devices with one device.

It prints JSON. It computes in float64, where results that differ only in the order of additions agree to many more
digits than results with any mistake.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from small_models import small_model

from dsv3_jax import model as model_module
from dsv3_jax.config import ModelConfig
from dsv3_jax.data import DataConfig
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.modules.devices import Devices, OneDevice
from dsv3_jax.pipeline import weights
from dsv3_jax.pipeline.executor import run_ticks
from dsv3_jax.pipeline.schedules import ScheduleName, make_schedule
from dsv3_jax.pipeline.slots import FOR_INPUT, FOR_WEIGHTS, tick_table
from dsv3_jax.precision import Precision
from dsv3_jax.sharding.mesh import MeshConfig, make_mesh
from dsv3_jax.sharding.on_mesh import OnMesh
from dsv3_jax.sharding.rules import batch_spec, shardings
from dsv3_jax.training.config import RunConfig, TrainingConfig
from dsv3_jax.training.losses import BatchTargets, LossWeights, objective
from dsv3_jax.training.state import split_model
from dsv3_jax.training.step import accumulate, make_pipelined_gradients

MODEL = ModelConfig.preset("tiny", num_hidden_layers=6, first_k_dense_replace=1, vocab_size=254)
CASES = (
    (
        "stage=2,fsdp=2,tensor=2",
        "dualpipe",
        "report",
        "",
        "1",
    ),  # the last stage's layers fill all slots of other stages
    ("stage=4", "1f1b", "report", "", "2"),  # they leave two empty
    ("stage=2", "1f1b", "report", "fp8", "1"),
)
"""Mesh, schedule, rematerialisation policy, precision, float64 where it is empty, and number of MTP modules.

Others than these can be given as in `simulated_pipelines.py stage=4 zb1p none "" 1`.
"""

PASSES, ROWS, LENGTH = 7, 4, 12  # DualPipe wants an even number
EXACT = Precision(name="float64", compute_dtype="float64")


RUN = RunConfig(
    preset="",
    model=MODEL,
    data=DataConfig(sequence_length=LENGTH, vocab_size=MODEL.vocab_size, isolate_documents=True),
    # The balance term of a whole pass is not the sum of its sequences' terms, so ranks must sum their parts first.
    training=TrainingConfig(batch_size=8 * ROWS, micro_batch_size=ROWS, balance="batch"),
    precision="float32",
)
LOSS_WEIGHTS = LossWeights(balance=jnp.asarray(0.5), mtp=jnp.asarray(0.3))


model_module.MOST_UNROLLED_LAYERS = 1  # compiles faster


def chain(name: ScheduleName, ranks: int = 8, passes: int = 17) -> tuple[float, float]:
    """Runs stages that multiply by a number each through the executor; their gradients are products of numbers.

    Returns:
      Relative differences of the gradients by the inputs and by the stages' numbers.
    """
    passes += name == "dualpipe"
    table = tick_table(make_schedule(name, ranks, passes))
    random = np.random.default_rng(1)
    weights, inputs, slopes = (1 + random.random(size) for size in (ranks, passes, passes))
    mesh = make_mesh(MeshConfig(stage=ranks))

    def on_a_rank(own: Any) -> Any:
        def together(entry: Any, h: Any, g: Any, carry: Any) -> Any:
            h = jnp.where(entry.forward_stage == 0, jnp.asarray(inputs)[entry.forward_micro_batch], h)
            # On the last stage g is the output. Multiplying by it and dividing by its true value checks it.
            m, stage = entry.backward_micro_batch, entry.backward_stage
            output = carry[0][entry.backward_kept_slot] * jnp.asarray(weights)[stage]
            last = (stage == ranks - 1) & (entry.backward_parts & FOR_INPUT != 0)
            return h, jnp.where(last, jnp.asarray(slopes)[m] * g / output, g), carry

        def forward(entry: Any, h: Any, carry: Any) -> Any:
            m, slot = entry.forward_micro_batch, entry.forward_kept_slot
            kept = carry[0].at[slot].set(jnp.where(m >= 0, h[0, 0, 0], carry[0][slot]))
            return h * jnp.asarray(weights)[entry.forward_stage], kept

        def compute(entry: Any, h: Any, g: Any, carry: Any) -> Any:
            output, kept = forward(entry, h, carry)
            _, by_weights, by_inputs = carry
            for_input = entry.backward_parts & FOR_INPUT != 0
            for_weights = entry.backward_parts & FOR_WEIGHTS != 0
            m, stage = entry.backward_micro_batch, entry.backward_stage
            weight = jnp.asarray(weights)[stage]
            value = g[0, 0, 0]
            by_weights = by_weights.at[stage].add(jnp.where(for_weights, value * kept[entry.backward_kept_slot], 0))
            by_inputs = by_inputs.at[m].add(jnp.where((stage == 0) & for_input, value * weight, 0))
            return output, g * weight, (kept, by_weights, by_inputs)

        carry = (jnp.zeros(table.slots.kept), jnp.zeros(ranks), jnp.zeros(passes))
        _, *found = run_ticks(table, own, together, compute, carry, jnp.zeros((1, 1, 1)))
        return jax.lax.psum(tuple(found), "stage")

    run = jax.shard_map(
        on_a_rank,
        mesh=mesh,
        axis_names={"stage"},
        in_specs=PartitionSpec(None, "stage"),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    by_weights, by_inputs = jax.jit(run)(table.entries)
    product = np.prod(weights)
    return distance(product * np.sum(inputs * slopes) / weights, by_weights), distance(product * slopes, by_inputs)


def batch() -> tuple[np.ndarray, np.ndarray]:
    """Returns rows of two documents each, with padding that differs between micro-batches."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, MODEL.vocab_size, (PASSES, ROWS, LENGTH + 1)).astype(np.int32)
    segment_ids = np.ones_like(tokens)
    segment_ids[..., 7:] = 2
    segment_ids[0, 1, 9:] = 0
    segment_ids[-1, 0, 4:] = 0
    return tokens, segment_ids


def make_model(devices: Devices, policy: str, precision: str, depths: int) -> DeepSeekV3:
    """Returns a model whose weights are large enough for experts to differ in their load."""
    recipe = Precision.preset(precision) if precision else EXACT
    dtype = jnp.float32 if precision else jnp.float64
    config = MODEL.replace(num_nextn_predict_layers=depths)
    model = small_model(config, 0, precision=recipe, param_dtype=dtype, devices=devices, remat=policy)
    _, params, _ = nnx.split(model, nnx.Param, ...)
    nnx.update(model, jax.tree.map(lambda leaf: 10 * leaf if leaf.ndim > 1 else leaf, params))
    return model


def batch_targets(depths: int) -> BatchTargets:
    isolate = RUN.data.isolate_documents
    counted = BatchTargets.count(jnp.asarray(batch()[1]), depths, isolate_segments=isolate)
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), counted)


def unpipelined(depths: int) -> Any:
    skeleton, params, biases = split_model(make_model(OneDevice(), "none", "", depths))
    tokens, segment_ids = batch()
    targets = batch_targets(depths)

    def loss(params: Any, tokens: Any, segment_ids: Any) -> Any:
        terms = objective(
            skeleton.model(params, biases),
            tokens,
            segment_ids,
            weights=LOSS_WEIGHTS,
            targets=targets,
            balance=RUN.training.balance,
            isolate_segments=RUN.data.isolate_documents,
            chunk=RUN.training.loss_chunk,
        )
        return terms.total, terms

    def one_pass(*arrays: Any) -> Any:
        return jax.grad(loss, has_aux=True)(params, *arrays)

    return jax.jit(lambda *arrays: accumulate(one_pass, *arrays))(tokens, segment_ids)


def pipelined(text: str, name: Any, policy: str, precision: str, mtp: str) -> Any:
    sizes = MeshConfig.parse(text)
    count = math.prod(sizes.sizes.values())
    mesh = make_mesh(sizes, jax.devices()[:count])
    skeleton, params, biases = split_model(make_model(OnMesh(mesh), policy, precision, depths := int(mtp)))
    params = jax.device_put(params, shardings(params, mesh))
    tokens, segment_ids = jax.device_put(batch(), NamedSharding(mesh, batch_spec(1)))
    training = dataclasses.replace(RUN.training, pipeline_schedule=name)
    run = dataclasses.replace(RUN, model=MODEL.replace(num_nextn_predict_layers=depths), training=training)
    return jax.jit(make_pipelined_gradients(skeleton, run, mesh))(
        params, biases, tokens, segment_ids, LOSS_WEIGHTS, batch_targets(depths)
    )


def distance(a: Any, b: Any) -> float:
    a, b = np.asarray(a), np.asarray(b)
    return float(np.max(np.abs(a - b)) / np.max(np.abs(a)))


def main() -> None:
    results: dict[str, Any] = {"chains": {name: chain(name) for name in ("1f1b", "zb1p", "dualpipe")}}
    for case in CASES if len(sys.argv) == 1 else [sys.argv[1:]]:
        others, other_terms = pipelined(*case)
        if case[3]:  # roundings differ with the order of sums, but not where a pipeline's products round masters
            with mock.patch.object(weights, "working_formats", return_value={}):
                gradients, terms = pipelined(*case)
        else:
            gradients, terms = unpipelined(int(case[4]))
        results[" ".join(case)] = {
            "load": bool((np.asarray(terms.load) == np.asarray(other_terms.load)).all()),
            "terms": {
                field: distance(getattr(terms, field), getattr(other_terms, field))
                for field in ("total", "main", "mtp", "balance")
            },
            "gradients": {
                jax.tree_util.keystr(path): value
                for path, value in jax.tree_util.tree_leaves_with_path(jax.tree.map(distance, gradients, others))
            },
        }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
