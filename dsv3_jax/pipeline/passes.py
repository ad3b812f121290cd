"""Gradients of a batch whose micro-batches go through pipeline stages (report section 3.2.1).

The MoE layers are divided among the ranks of the stage axis, and so are the embedding, by columns, and the output head,
by rows. The blocks of the MTP modules are on the last stage, in slots of its MoE layers. Every rank has all other
weights: the first stage uses the dense layers, and the last stage the final norm and the MTP modules. A stage's balance
terms are differentiated on that stage. In a rank's program every array is its own shard along all axes but tensor,
which is left to the compiler. Gradients are summed over the replicas of a weight once, at the end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from dsv3_jax.errors import ConfigError
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.pipeline import weights as stage_weights
from dsv3_jax.pipeline.executor import AXIS, run_ticks
from dsv3_jax.pipeline.mtp_slots import Blocks, put_blocks, split_blocks, take_blocks, tree_of_blocks, with_slots
from dsv3_jax.pipeline.predictions import BatchTargets, LossSums, LossWeights, Predictions, StageObjective
from dsv3_jax.pipeline.residuals import SlotLayout
from dsv3_jax.pipeline.schedules import ScheduleName, check_micro_batches, schedule_of_step
from dsv3_jax.pipeline.slots import TickEntry, TickTable, layer_slots, tick_table
from dsv3_jax.pipeline.stacked_layers import StackedLayers
from dsv3_jax.pipeline.stage import (
    DENSE,
    EMBEDDING,
    HEAD,
    MOE,
    OTHERS,
    StageCarry,
    StageComputation,
    block_inputs,
)
from dsv3_jax.sharding.rules import BATCH_AXES, batch_spec

_NAMED = (MOE, DENSE, EMBEDDING, HEAD)
_BLOCKS = "mtp_blocks"

PipelinedPass = Callable[..., tuple[nnx.State, LossSums]]


def make_pipelined_pass(
    make_model: Callable[[nnx.State, Float[Array, "layers E"]], DeepSeekV3],
    objective: StageObjective,
    mesh: Mesh,
    schedule_name: ScheduleName,
    layers: tuple[int, ...],
) -> PipelinedPass:
    """Returns (params, biases, tokens [A, B, T+1], segment_ids [A, B, T+1], weights, targets) -> (gradients, sums).

    Both are the sums over the A micro-batches that training without a pipeline gives, up to the order of additions. If
    the schedule needs more micro-batches than A, as it may while the batch size still grows, empty ones are added.

    Args:
      make_model: (params, router biases) -> the model.
      layers: how many MoE layers each stage holds.
    """
    everywhere = PartitionSpec()

    def run(
        params: nnx.State,
        biases: Float[Array, "layers E"],
        tokens: Int[Array, "A B T1"],
        segment_ids: Int[Array, "A B T1"],
        loss_weights: LossWeights,
        targets: BatchTargets,
    ) -> tuple[nnx.State, LossSums]:
        micro_batches = _enough_micro_batches(schedule_name, mesh.shape[AXIS], tokens.shape[0])
        fill = ((0, micro_batches - tokens.shape[0]), (0, 0), (0, 0))
        tokens, segment_ids = jnp.pad(tokens, fill), jnp.pad(segment_ids, fill)
        schedule = schedule_of_step(schedule_name, mesh.shape[AXIS], micro_batches)
        table = tick_table(schedule)
        model = make_model(params, biases)
        formats = stage_weights.working_formats(model, mesh)
        parts, layouts = split_parts(params), split_parts(stage_weights.weight_layouts(params, mesh, layers, formats))
        graphs, rests = _parts_of_model(model)
        run_rank = functools.partial(
            _run_rank,
            objective=objective,
            layers=layers,
            directions=schedule.directions,
            table=table,
            graphs=graphs,
            layouts=layouts,
            mesh=mesh,
        )
        specs = stage_weights.specs_of(layouts)
        gradients, load, sums = jax.shard_map(
            run_rank,
            mesh=mesh,
            axis_names=stage_weights.manual_axes(mesh),
            in_specs=(
                PartitionSpec(None, AXIS),
                specs,
                everywhere,
                *[batch_spec(leading=1)] * 2,
                *[everywhere] * 3,
            ),
            out_specs=(specs, PartitionSpec(AXIS), everywhere),
            check_vma=False,
        )(
            table.entries,
            parts,
            rests,
            tokens,
            segment_ids,
            loss_weights,
            targets,
            jnp.asarray(layers, jnp.int32),
        )
        load = jnp.concatenate([stage_weights.unpad_stages(load, layers), sums.load])
        named = {name: gradients[name] for name in _NAMED if name in params}
        # The leaves are in the order of `params`, but a State that is put together from parts has other inner nodes.
        whole = nnx.merge_state(gradients[OTHERS], tree_of_blocks(gradients[_BLOCKS]), nnx.State(named))
        leaves = jax.tree.leaves(whole)
        gradients = jax.tree.unflatten(jax.tree.structure(params), leaves)
        return gradients, LossSums(sums.main, sums.mtp, sums.balance, load)

    return run


def check_passes(
    schedule_name: ScheduleName, stages: int, *, batch_size: int, rows_per_pass: int, batch_ranks: int = 1
) -> None:
    """Checks that the schedule can run the micro-batches of a full batch.

    Args:
      rows_per_pass: sequences in a micro-batch.
      batch_ranks: devices among which the sequences of a micro-batch are divided.

    Raises:
      ConfigError: it cannot; with the nearest number of sequences in a micro-batch, or else in a batch, for which it
        can.
    """
    check_micro_batches(schedule_name, stages, 4 * stages)  # raises what no number of micro-batches would avoid

    def fits(rows: int) -> bool:
        return _enough_micro_batches(schedule_name, stages, batch_size // rows) == batch_size // rows

    if fits(rows_per_pass):
        return
    near = [r for r in range(batch_ranks, batch_size + 1, batch_ranks) if batch_size % r == 0 and fits(r)]
    if near:
        mend = f"use {min(near, key=lambda r: abs(r - rows_per_pass))}"
    else:
        enough = _enough_micro_batches(schedule_name, stages, batch_size // rows_per_pass)
        mend = f"use a batch of {rows_per_pass * enough}"
    raise ConfigError(
        f"training.micro_batch_size ({rows_per_pass}) cuts a batch of {batch_size} into "
        f"{batch_size // rows_per_pass} micro-batches, which {schedule_name} cannot place on {stages} stages; {mend}"
    )


def _enough_micro_batches(schedule_name: ScheduleName, stages: int, at_least: int) -> int:
    """Returns the fewest micro-batches, `at_least` or more, that the schedule can run."""
    while True:
        try:
            check_micro_batches(schedule_name, stages, at_least)
        except ConfigError:
            at_least += 1
        else:
            return at_least


def split_parts(tree: nnx.State) -> dict[str, Any]:
    """Returns the parts of a tree of parameters: States, and of the blocks of the MTP modules a list of them."""
    named = {name: tree[name] if name in tree else nnx.State({}) for name in _NAMED}
    others, blocks = split_blocks(nnx.State({name: branch for name, branch in tree.items() if name not in named}))
    return named | {OTHERS: others, _BLOCKS: blocks}


def weights_of_rank(
    parts: dict[str, Any], layouts: dict[str, Any], layers: tuple[int, ...], directions: int
) -> tuple[dict[str, nnx.State], Blocks]:
    """Returns the weights that a rank keeps while a step runs, by part, from all ranks' shards of them.

    Args:
      parts: this rank's shards, as `split_parts` returns them.
      layouts: their `StageWeightLayout`s.
      layers: how many MoE layers each stage holds.

    Returns:
      The parts but for the blocks of the MTP modules, of which a last stage has one in each layer slot behind its MoE
      layers; and the blocks, for their structure.
    """
    weights = jax.tree.map(stage_weights.to_stage, parts, layouts)
    blocks: Blocks = weights.pop(_BLOCKS)
    moe = with_slots(weights[MOE], layer_slots(layers, len(blocks)))
    moe = put_blocks(moe, blocks, layers[-1])
    if directions == 2:
        moe = jax.tree.map(stage_weights.with_opposite_stage, moe)
    return weights | {MOE: moe}, blocks


def _parts_of_model(model: DeepSeekV3) -> tuple[dict[str, Any], dict[str, nnx.State]]:
    """Returns structure and router biases of every part that the model has; all but OTHERS are taken out of it.

    The blocks of the MTP modules are part of OTHERS here.
    """
    graphs, rests = {}, {}
    for name in _NAMED:
        if hasattr(model, name):
            graphs[name], _, rests[name] = nnx.split(getattr(model, name), nnx.Param, ...)
            delattr(model, name)
    graphs[OTHERS], _, rests[OTHERS] = nnx.split(model, nnx.Param, ...)
    return graphs, rests


def _run_rank(
    own: TickEntry,
    params: dict[str, Any],
    rests: dict[str, nnx.State],
    tokens: Int[Array, "A b T1"],
    segment_ids: Int[Array, "A b T1"],
    loss_weights: LossWeights,
    targets: BatchTargets,
    layer_counts: Int[Array, " stages"],
    *,
    objective: StageObjective,
    layers: tuple[int, ...],
    directions: int,
    table: TickTable,
    graphs: dict[str, Any],
    layouts: dict[str, Any],
    mesh: Mesh,
) -> tuple[dict[str, Any], Int[Array, "L E"], LossSums]:
    """Runs one rank's program.

    Args:
      own: this rank's part of the tick table.
      params, rests: shards of the parameters as in the state, and router biases, by part.
      layouts: the `StageWeightLayout`s of the parameters.

    Returns:
      The gradients of the parameters, summed over ranks, sharded as they are; the load of this rank's layers; and the
      loss terms of the batch, with the load of the MTP blocks.
    """
    slots = layer_slots(layers, len(params[_BLOCKS]))
    with jax.named_scope("weights_to_stages"):
        weights, blocks = weights_of_rank(params, layouts, layers, directions)
        layout = stage_weights.StageWeightLayout.replicated_layers(layers)
        moe_rest = jax.tree.map(lambda leaf: stage_weights.to_stage(leaf, layout), rests[MOE])
        moe_rest = with_slots(moe_rest, slots)
        if directions == 2:
            moe_rest = jax.tree.map(stage_weights.with_opposite_stage, moe_rest)
        layouts_held = {name: layouts[name] for name in weights}
        weights = stage_weights.keep_automatic(weights, layouts_held, mesh)

    model = nnx.merge(graphs[OTHERS], weights[OTHERS], tree_of_blocks(blocks), rests[OTHERS])
    experts, depth = model.config.n_routed_experts, model.config.num_nextn_predict_layers
    shape = (tokens.shape[1], tokens.shape[2] - 1, model.config.hidden_size)
    message = jnp.zeros(shape, model.precision.dtype)
    inputs = block_inputs(model, objective, tokens[0], segment_ids[0])
    zero = jnp.zeros((), targets.real.dtype)

    stacked = functools.partial(
        StackedLayers.of,
        policy=model.remat,
        balance_term=objective.balance_term,
        inputs=inputs,
        h=message,
    )
    moe = stacked(0, graphs[MOE], weights[MOE], moe_rest)
    dense = stacked(1, graphs[DENSE], weights[DENSE], rests[DENSE]) if DENSE in graphs else None
    types, count = ((), 0) if dense is None else (dense.passes.types, dense.count)
    slot_layout = SlotLayout.of(moe.passes.types, layers, types, count)
    gradients = stage_weights.zero_gradients(weights, {name: params[name] for name in weights})
    gradients = stage_weights.keep_automatic(gradients, layouts_held, mesh)
    carry = StageCarry(
        kept=slot_layout.buffers(table.slots.kept),
        gradients=gradients,
        load=jnp.zeros((directions * slots, experts), jnp.int32),
        sums=LossSums(zero, jnp.zeros((depth,), zero.dtype), zero, jnp.zeros((depth, experts), jnp.int32)),
        by_embedded=message,
    )
    predictions = Predictions.of(
        graphs[OTHERS],
        weights[OTHERS],
        rests[OTHERS],
        blocks,
        objective,
        inputs,
        jnp.stack([message] * (1 + (depth > 0))),
        loss_weights=loss_weights,
        targets=targets,
        directions=directions,
        moe=weights[MOE],
        head_graph=graphs[HEAD],
        head_params=weights[HEAD],
    )
    stage = StageComputation(
        objective=objective,
        moe=moe,
        dense=dense,
        model=model,
        embedding_graph=graphs[EMBEDDING],
        table=weights[EMBEDDING],
        predictions=predictions,
        slot_layout=slot_layout,
        tokens=tokens,
        segment_ids=segment_ids,
        loss_weights=loss_weights,
        targets=targets,
        layer_counts=layer_counts,
        slots_per_stage=slots,
        splits_backward=table.splits_backward,
        pairs=table.pairs,
    )
    carry = run_ticks(table, own, stage.together, stage.compute, carry, message)

    with jax.named_scope("gradients_from_stages"):
        gradients, load = carry.gradients, carry.load
        if directions == 2:
            gradients[MOE], load = jax.tree.map(stage_weights.add_opposite_stage, (gradients[MOE], load))
        gradients[_BLOCKS] = take_blocks(gradients[MOE], params[_BLOCKS], layers[-1])
        gradients[MOE], load = jax.tree.map(lambda leaf: leaf[: max(layers)], (gradients[MOE], load))
        summed = jax.tree.map(stage_weights.from_stage, gradients, layouts)
        sums = lax.psum(carry.sums, AXIS)
        main, mtp, balance = lax.psum((sums.main, sums.mtp, sums.balance), BATCH_AXES)
    return summed, load, LossSums(main, mtp, balance, sums.load)
