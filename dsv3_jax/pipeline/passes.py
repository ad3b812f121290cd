"""Gradients of a batch whose micro-batches go through pipeline stages (report section 3.2.1).

The MoE layers are divided among the ranks of the stage axis. Every rank has all other weights: the first stage uses the
embedding and the dense layers, and the last stage the final norm, the MTP modules and the output head. A stage's
balance terms are differentiated on that stage. In a rank's program every array is its own shard along all axes but
tensor, which is left to the compiler. Gradients are summed over the replicas of a weight once, at the end.
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
from dsv3_jax.pipeline.schedules import ScheduleName, check_micro_batches, make_schedule
from dsv3_jax.pipeline.slots import TickEntry, TickTable, tick_table
from dsv3_jax.pipeline.stage import BatchTargets, LossSums, LossWeights, StageCarry, StageComputation, StageObjective
from dsv3_jax.sharding.rules import BATCH_AXES, batch_spec

_BLOCKS = "moe_blocks"
"""Name of the stacked MoE layers in the tree of parameters."""

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
        schedule = make_schedule(schedule_name, mesh.shape[AXIS], micro_batches)
        table = tick_table(schedule)
        model = make_model(params, biases)
        block_graph, _, block_rest = nnx.split(model.moe_blocks, nnx.Param, ...)
        del model.moe_blocks
        graph, _, rest = nnx.split(model, nnx.Param, ...)
        blocks, shared = _split(params)
        block_layouts, shared_layouts = _split(stage_weights.weight_layouts(params, mesh, layers))
        run_rank = functools.partial(
            _run_rank,
            objective=objective,
            layers=layers,
            directions=schedule.directions,
            table=table,
            graphs=(block_graph, graph),
            layouts=(block_layouts, shared_layouts),
            mesh=mesh,
        )
        block_specs, shared_specs = stage_weights.specs_of(block_layouts), stage_weights.specs_of(shared_layouts)
        block_gradients, shared_gradients, load, sums = jax.shard_map(
            run_rank,
            mesh=mesh,
            axis_names=stage_weights.manual_axes(mesh),
            in_specs=(
                PartitionSpec(None, AXIS),
                (block_specs, everywhere),
                (shared_specs, everywhere),
                *[batch_spec(leading=1)] * 2,
                *[everywhere] * 3,
            ),
            out_specs=(block_specs, shared_specs, PartitionSpec(AXIS), everywhere),
            check_vma=False,
        )(
            table.entries,
            (blocks, block_rest),
            (shared, rest),
            tokens,
            segment_ids,
            loss_weights,
            targets,
            jnp.asarray(layers, jnp.int32),
        )
        load = jnp.concatenate([stage_weights.unpad_stages(load, layers), sums.load])
        gradients = nnx.State({**shared_gradients, _BLOCKS: block_gradients})
        # The leaves are in the order of `params`, but a State that is put together from parts has other inner nodes.
        gradients = jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(gradients))
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


def _split(tree: nnx.State) -> tuple[nnx.State, nnx.State]:
    """Returns the part of a tree of parameters that is the MoE layers, and all else."""
    return tree[_BLOCKS], nnx.State({name: branch for name, branch in tree.items() if name != _BLOCKS})


def _run_rank(
    own: TickEntry,
    blocks: tuple[nnx.State, nnx.State],
    shared: tuple[nnx.State, nnx.State],
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
    graphs: tuple[Any, Any],
    layouts: tuple[Any, Any],
    mesh: Mesh,
) -> tuple[nnx.State, nnx.State, Int[Array, "L E"], LossSums]:
    """Runs one rank's program.

    Args:
      own: this rank's part of the tick table.
      blocks, shared: shards of the parameters as in the state, and router biases, of the MoE layers and of all else.
      layouts: the `StageWeightLayout`s of both.

    Returns:
      The gradients of both, summed over ranks, sharded as the parameters; the load of this rank's layers; and the loss
      terms of the batch, with the load of the MTP blocks.
    """
    block_layouts, shared_layouts = layouts
    slots = max(layers)
    with jax.named_scope("weights_to_stages"):
        to_stage = functools.partial(stage_weights.to_stage, layers=layers)
        own_layers = (
            jax.tree.map(to_stage, blocks[0], block_layouts),
            jax.tree.map(lambda leaf: to_stage(leaf, stage_weights.ON_ALL_RANKS), blocks[1]),
        )
        if directions == 2:
            own_layers = jax.tree.map(stage_weights.with_opposite_stage, own_layers)
        block_params = stage_weights.keep_automatic(own_layers[0], block_layouts, mesh)
        shared_params = jax.tree.map(stage_weights.to_all_stages, shared[0], shared_layouts)
        shared_params = stage_weights.keep_automatic(shared_params, shared_layouts, mesh)

    model = nnx.merge(graphs[1], shared_params, shared[1])
    experts, depth = model.config.n_routed_experts, model.config.num_nextn_predict_layers
    shape = (tokens.shape[1], tokens.shape[2] - 1, model.config.hidden_size)
    message = jnp.zeros(shape, model.precision.dtype)
    zero = jnp.zeros((), targets.real.dtype)

    def zeros(params: nnx.State, params_layouts: Any) -> nnx.State:
        return stage_weights.keep_automatic(jax.tree.map(jnp.zeros_like, params), params_layouts, mesh)

    carry = StageCarry(
        kept=jnp.zeros((table.slots.kept, slots, *shape), message.dtype),
        block_gradients=zeros(block_params, block_layouts),
        shared_gradients=zeros(shared_params, shared_layouts),
        load=jnp.zeros((directions * slots, experts), jnp.int32),
        sums=LossSums(zero, jnp.zeros((depth,), zero.dtype), zero, jnp.zeros((depth, experts), jnp.int32)),
    )
    stage = StageComputation(
        objective=objective,
        graphs=graphs,
        blocks=(block_params, own_layers[1]),
        shared=(shared_params, shared[1]),
        tokens=tokens,
        segment_ids=segment_ids,
        loss_weights=loss_weights,
        targets=targets,
        layer_counts=layer_counts,
        slots_per_stage=slots,
        splits_backward=table.splits_backward,
    )
    carry = run_ticks(table, own, stage.forward, stage.backward, carry, message)

    with jax.named_scope("gradients_from_stages"):
        block_gradients, load = carry.block_gradients, carry.load
        if directions == 2:
            block_gradients, load = jax.tree.map(stage_weights.add_opposite_stage, (block_gradients, load))
        from_stage = functools.partial(stage_weights.from_stage, layers=layers)
        block_gradients = jax.tree.map(from_stage, block_gradients, block_layouts)
        shared_gradients = jax.tree.map(stage_weights.from_all_stages, carry.shared_gradients, shared_layouts)
        sums = lax.psum(carry.sums, AXIS)
        main, mtp, balance = lax.psum((sums.main, sums.mtp, sums.balance), BATCH_AXES)
    return block_gradients, shared_gradients, load, LossSums(main, mtp, balance, sums.load)
