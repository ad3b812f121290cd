"""Gradients of a batch whose micro-batches go through pipeline stages (report section 3.2.1).

The MoE layers are divided over the ranks of the stage axis. Everything else is on every rank: the first stage uses
embedding and dense layers, the last one final norm, MTP modules and head. Each stage's balance terms are
differentiated where they arise. The other axes of the mesh work inside a stage as they do without a pipeline.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from dsv3_jax.errors import ConfigError
from dsv3_jax.sharding.pipeline_executor import AXIS, run_lockstep
from dsv3_jax.sharding.pipeline_schedules import ScheduleName, make_schedule
from dsv3_jax.sharding.pipeline_tables import INPUT, Lockstep, Places, lockstep, moe_layers_of_stages
from dsv3_jax.sharding.rules import BATCH_AXES
from dsv3_jax.training.config import RunConfig
from dsv3_jax.training.losses import LossTerms, LossWeights, weighted
from dsv3_jax.training.pipeline_stage import Progress, StageComputation, Sums, laid_out, on_batch_axes
from dsv3_jax.training.state import Skeleton

PipelinedPass = Callable[..., tuple[nnx.State, LossTerms]]


def make_pipelined_pass(
    skeleton: Skeleton, config: RunConfig, mesh: Mesh, schedule_name: ScheduleName
) -> PipelinedPass:
    """(params, biases, tokens [A, B, T+1], segment_ids [A, B, T+1], weights, real_tokens) -> (gradients, terms).

    Both are the sums over the A passes that training without a pipeline arrives at, up to the order of float32 sums.

    Raises:
      ConfigError: more stages than MoE layers, or passes that the schedule cannot place: those of the first and the
        full batch, and when it is traced those that it is given.
    """
    layers = moe_layers_of_stages(config.model, mesh.shape[AXIS])
    check_passes(config, schedule_name, mesh.shape[AXIS], math.prod(mesh.shape[axis] for axis in BATCH_AXES))
    stage_axis, everywhere = PartitionSpec(AXIS), PartitionSpec()

    def run(
        params: nnx.State,
        biases: Float[Array, "layers E"],
        tokens: Int[Array, "A B T1"],
        segment_ids: Int[Array, "A B T1"],
        weights: LossWeights,
        real_tokens: Float[Array, ""],
    ) -> tuple[nnx.State, LossTerms]:
        schedule = make_schedule(schedule_name, mesh.shape[AXIS], tokens.shape[0])
        tables, places = lockstep(schedule)
        model = skeleton.model(params, biases)
        block_graph, blocks, block_rest = nnx.split(model.moe_blocks, nnx.Param, ...)
        del model.moe_blocks
        graph, shared, rest = nnx.split(model, nnx.Param, ...)
        run_stage = functools.partial(
            _run_rank,
            config=config,
            layers=layers,
            directions=schedule.directions,
            tables=tables,
            places=places,
            graphs=(block_graph, graph),
            chunk=config.training.loss_chunk * math.prod(mesh.shape[axis] for axis in BATCH_AXES),
            mesh=mesh,
        )
        in_place, out_of_place = _places_of_layers(layers)
        arranged = jax.tree.map(lambda leaf: leaf[in_place], (blocks, block_rest))
        block_gradients, shared_gradients, load, sums = jax.shard_map(
            run_stage,
            mesh=mesh,
            axis_names={AXIS},
            in_specs=(PartitionSpec(None, AXIS), stage_axis, *[everywhere] * 6),
            out_specs=(stage_axis, everywhere, stage_axis, everywhere),
            check_vma=False,
        )(tables, arranged, (shared, rest), tokens, segment_ids, weights, real_tokens, jnp.asarray(layers, jnp.int32))
        block_gradients, load = jax.tree.map(lambda leaf: leaf[out_of_place], (block_gradients, load))
        joined = nnx.State({**shared_gradients, "moe_blocks": block_gradients})
        # The same leaves in the same order; nodes differ in kind where a state was put together from parts.
        gradients = jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(joined))
        terms = LossTerms(
            total=weighted(sums.main, sums.mtp, sums.balance, weights),
            main=sums.main,
            mtp=sums.mtp,
            balance=sums.balance,
            load=jnp.concatenate([load, sums.load]),
        )
        return gradients, terms

    return run


def check_passes(config: RunConfig, schedule_name: ScheduleName, stages: int, batch_ranks: int = 1) -> None:
    """That the schedule can place the passes of the run's first and of its full batch.

    Args:
      batch_ranks: parts that every pass is cut into.

    Raises:
      ConfigError: with the nearest number of sequences a pass, or a batch, for which it can.
    """
    training = config.training
    rows = training.rows_per_pass
    make_schedule(schedule_name, stages, 4 * stages)  # what no number of passes would mend

    def fits(batch: int, rows: int) -> bool:
        try:
            make_schedule(schedule_name, stages, batch // rows)
        except ConfigError:
            return False
        return True

    for batch in (training.batch_size, training.schedule.batch_at(0.0, training.batch_size, rows)):
        if fits(batch, rows):
            continue
        near = [r for r in range(batch_ranks, batch + 1, batch_ranks) if batch % r == 0 and fits(batch, r)]
        if near:
            mend = f"use {min(near, key=lambda r: abs(r - rows))}"
        else:
            larger = next(p for p in itertools.count(batch // rows) if fits(p * rows, rows))
            mend = f"use a batch of {larger * rows}"
        which = "a" if batch == training.batch_size else "the first"
        raise ConfigError(
            f"training.micro_batch_size ({rows}) cuts {which} batch of {batch} into {batch // rows} micro-batches, "
            f"which {schedule_name} cannot place on {stages} stages; {mend}"
        )


def _places_of_layers(layers: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Which layer lies at every place, each stage having as many as the fullest; and the place of every layer."""
    room, starts = max(layers), np.cumsum((0, *layers))
    in_place = [starts[s] + i if i < n else 0 for s, n in enumerate(layers) for i in range(room)]
    out_of_place = [s * room + i for s, n in enumerate(layers) for i in range(n)]
    return np.array(in_place), np.array(out_of_place)


def _run_rank(
    mine: Lockstep,
    arranged: tuple[nnx.State, nnx.State],
    others: tuple[nnx.State, nnx.State],
    tokens: Int[Array, "A B T1"],
    segment_ids: Int[Array, "A B T1"],
    weights: LossWeights,
    real_tokens: Float[Array, ""],
    layer_counts: Int[Array, " stages"],
    *,
    config: RunConfig,
    layers: tuple[int, ...],
    directions: int,
    tables: Lockstep,
    places: Places,
    graphs: tuple[Any, Any],
    chunk: int,
    mesh: Mesh,
) -> tuple[nnx.State, nnx.State, Int[Array, "L E"], Sums]:
    """One rank's part: gradients of its layers and, summed over ranks, of all else; load and loss terms."""
    ranks, room = len(layers), max(layers)
    opposite = [(rank, ranks - 1 - rank) for rank in range(ranks)]

    def with_opposite(leaf: Array) -> Array:
        return jnp.concatenate([leaf, lax.ppermute(leaf, AXIS, opposite)])

    def home(leaf: Array) -> Array:
        return leaf[:room] + lax.ppermute(leaf[room:], AXIS, opposite)

    if directions == 2:
        arranged = jax.tree.map(with_opposite, arranged)
    arranged, others = laid_out((arranged, others), mesh)
    splits = bool((tables.backward == INPUT).any())
    rank = StageComputation(
        config,
        graphs,
        arranged,
        others,
        tokens,
        segment_ids,
        weights,
        real_tokens,
        layer_counts,
        room,
        chunk,
        splits,
        mesh,
    )
    model = rank.model(others[0])
    experts, depth = config.model.n_routed_experts, config.model.num_nextn_predict_layers
    shape = (tokens.shape[1], tokens.shape[2] - 1, config.model.hidden_size)
    message = on_batch_axes(jnp.zeros(shape, model.precision.dtype), 0)
    zero = jnp.zeros((), real_tokens.dtype)
    start = Progress(
        kept=on_batch_axes(jnp.zeros((places.kept, room, *shape), message.dtype), 2),
        block_gradients=laid_out(jax.tree.map(jnp.zeros_like, arranged[0]), mesh),
        shared_gradients=laid_out(jax.tree.map(jnp.zeros_like, others[0]), mesh),
        load=jnp.zeros((directions * room, experts), jnp.int32),
        sums=Sums(zero, jnp.zeros((depth,), zero.dtype), zero, jnp.zeros((depth, experts), jnp.int32)),
    )
    end = run_lockstep(tables, places, mine, rank.forward, rank.backward, start, message)
    block_gradients, load = end.block_gradients, end.load
    if directions == 2:
        block_gradients, load = jax.tree.map(home, (block_gradients, load))
    shared_gradients, sums = lax.psum((end.shared_gradients, end.sums), AXIS)
    return block_gradients, shared_gradients, load, sums
