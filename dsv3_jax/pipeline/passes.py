"""Gradients of a batch whose micro-batches go through pipeline stages (report section 3.2.1).

The MoE layers are divided over the ranks of the stage axis. Everything else is on every rank: the first stage uses
embedding and dense layers, the last one final norm, MTP modules and head. Each stage's balance terms are
differentiated where they arise. Inside, a rank has its own sequences and its own parts of the weights; only the tensor
axis, where there is one, is the compiler's. Gradients are summed over the replicas of a weight once, at the end.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from dsv3_jax.errors import ConfigError
from dsv3_jax.pipeline import weights as weights_of_stages
from dsv3_jax.pipeline.executor import AXIS, run_lockstep
from dsv3_jax.pipeline.schedules import ScheduleName, make_schedule
from dsv3_jax.pipeline.slots import INPUT, Lockstep, Places, lockstep, moe_layers_of_stages
from dsv3_jax.pipeline.stage import Progress, StageComputation, Sums, on_tensor_axis
from dsv3_jax.pipeline.weights import Place
from dsv3_jax.sharding.rules import BATCH_AXES, batch_spec
from dsv3_jax.training.config import RunConfig
from dsv3_jax.training.losses import LossTerms, LossWeights, total_loss
from dsv3_jax.training.state import Skeleton

PipelinedPass = Callable[..., tuple[nnx.State, LossTerms]]


def make_pipelined_pass(
    skeleton: Skeleton, config: RunConfig, mesh: Mesh, schedule_name: ScheduleName
) -> PipelinedPass:
    """(params, biases, tokens [A, B, T+1], segment_ids [A, B, T+1], weights, real_tokens) -> (gradients, terms).

    Both are the sums over the A passes that training without a pipeline arrives at, up to the order of float32 sums.
    While a batch still grows it may have fewer passes than the schedule can place: empty ones then fill it up.

    Raises:
      ConfigError: more stages than MoE layers, or a full batch whose passes the schedule cannot place.
    """
    layers = moe_layers_of_stages(config.model, mesh.shape[AXIS])
    check_passes(config, schedule_name, mesh.shape[AXIS], math.prod(mesh.shape[axis] for axis in BATCH_AXES))
    everywhere = PartitionSpec()

    def run(
        params: nnx.State,
        biases: Float[Array, "layers E"],
        tokens: Int[Array, "A B T1"],
        segment_ids: Int[Array, "A B T1"],
        weights: LossWeights,
        real_tokens: Float[Array, ""],
    ) -> tuple[nnx.State, LossTerms]:
        passes = _passes_that_fit(schedule_name, mesh.shape[AXIS], tokens.shape[0])
        fill = ((0, passes - tokens.shape[0]), (0, 0), (0, 0))
        tokens, segment_ids = jnp.pad(tokens, fill), jnp.pad(segment_ids, fill)
        schedule = make_schedule(schedule_name, mesh.shape[AXIS], passes)
        tables, places = lockstep(schedule)
        model = skeleton.model(params, biases)
        block_graph, blocks, block_rest = nnx.split(model.moe_blocks, nnx.Param, ...)
        del model.moe_blocks
        graph, shared, rest = nnx.split(model, nnx.Param, ...)
        of_blocks = weights_of_stages.places({"moe_blocks": blocks}, mesh, layers)["moe_blocks"]
        of_shared = weights_of_stages.places(shared, mesh, layers)
        run_stage = functools.partial(
            _run_rank,
            config=config,
            layers=layers,
            directions=schedule.directions,
            tables=tables,
            places=places,
            graphs=(block_graph, graph),
            lies=(of_blocks, of_shared),
            mesh=mesh,
        )
        block_specs, shared_specs = weights_of_stages.specs(of_blocks), weights_of_stages.specs(of_shared)
        block_gradients, shared_gradients, load, sums = jax.shard_map(
            run_stage,
            mesh=mesh,
            axis_names=weights_of_stages.taken_axes(mesh),
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
            tables,
            (blocks, block_rest),
            (shared, rest),
            tokens,
            segment_ids,
            weights,
            real_tokens,
            jnp.asarray(layers, jnp.int32),
        )
        load = weights_of_stages.from_places(load, layers)
        joined = nnx.State({**shared_gradients, "moe_blocks": block_gradients})
        # The same leaves in the same order; nodes differ in kind where a state was put together from parts.
        gradients = jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(joined))
        terms = LossTerms(
            total=total_loss(sums.main, sums.mtp, sums.balance, weights),
            main=sums.main,
            mtp=sums.mtp,
            balance=sums.balance,
            load=jnp.concatenate([load, sums.load]),
        )
        return gradients, terms

    return run


def check_passes(config: RunConfig, schedule_name: ScheduleName, stages: int, batch_ranks: int = 1) -> None:
    """That the schedule can place the passes of the run's full batch.

    Args:
      batch_ranks: parts that every pass is cut into.

    Raises:
      ConfigError: with the nearest number of sequences a pass, or a batch, for which it can.
    """
    batch, rows = config.training.batch_size, config.training.rows_per_pass
    make_schedule(schedule_name, stages, 4 * stages)  # says what no number of passes would mend

    def fits(rows: int) -> bool:
        return _passes_that_fit(schedule_name, stages, batch // rows) == batch // rows

    if fits(rows):
        return
    near = [r for r in range(batch_ranks, batch + 1, batch_ranks) if batch % r == 0 and fits(r)]
    if near:
        mend = f"use {min(near, key=lambda r: abs(r - rows))}"
    else:
        mend = f"use a batch of {rows * _passes_that_fit(schedule_name, stages, batch // rows)}"
    raise ConfigError(
        f"training.micro_batch_size ({rows}) cuts a batch of {batch} into {batch // rows} micro-batches, "
        f"which {schedule_name} cannot place on {stages} stages; {mend}"
    )


def _passes_that_fit(schedule_name: ScheduleName, stages: int, passes: int) -> int:
    """The fewest micro-batches, `passes` or more, that the schedule can place."""
    while True:
        try:
            make_schedule(schedule_name, stages, passes)
        except ConfigError:
            passes += 1
        else:
            return passes


def _run_rank(
    mine: Lockstep,
    blocks: tuple[nnx.State, nnx.State],
    others: tuple[nnx.State, nnx.State],
    tokens: Int[Array, "A b T1"],
    segment_ids: Int[Array, "A b T1"],
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
    lies: tuple[Any, Any],
    mesh: Mesh,
) -> tuple[nnx.State, nnx.State, Int[Array, "L E"], Sums]:
    """One rank's part: gradients of its layers and, summed over ranks, of all else; load and loss terms.

    Args:
      blocks, others: parameters and router biases, of the layers and of all else, as the state has them.
      lies: the `weights_of_stages.Place`s of both.
    """
    ranks, room = len(layers), max(layers)
    opposite = [(rank, ranks - 1 - rank) for rank in range(ranks)]

    def with_opposite(leaf: Array) -> Array:
        return jnp.concatenate([leaf, lax.ppermute(leaf, AXIS, opposite)])

    def home(leaf: Array) -> Array:
        return leaf[:room] + lax.ppermute(leaf[room:], AXIS, opposite)

    of_blocks, of_shared = lies
    own_layers = functools.partial(weights_of_stages.to_stage, layers=layers)
    whole = Place(PartitionSpec(), None, ())
    arranged = (
        jax.tree.map(own_layers, blocks[0], of_blocks),
        jax.tree.map(lambda leaf: own_layers(leaf, whole), blocks[1]),
    )
    others = (jax.tree.map(weights_of_stages.to_all_stages, others[0], of_shared), others[1])
    if directions == 2:
        arranged = jax.tree.map(with_opposite, arranged)
    arranged, others = on_tensor_axis((arranged, others), mesh)
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
        splits,
    )
    model = rank.model(others[0])
    experts, depth = config.model.n_routed_experts, config.model.num_nextn_predict_layers
    shape = (tokens.shape[1], tokens.shape[2] - 1, config.model.hidden_size)
    message = jnp.zeros(shape, model.precision.dtype)
    zero = jnp.zeros((), real_tokens.dtype)
    start = Progress(
        kept=jnp.zeros((places.kept, room, *shape), message.dtype),
        block_gradients=on_tensor_axis(jax.tree.map(jnp.zeros_like, arranged[0]), mesh),
        shared_gradients=on_tensor_axis(jax.tree.map(jnp.zeros_like, others[0]), mesh),
        load=jnp.zeros((directions * room, experts), jnp.int32),
        sums=Sums(zero, jnp.zeros((depth,), zero.dtype), zero, jnp.zeros((depth, experts), jnp.int32)),
    )
    end = run_lockstep(tables, places, mine, rank.forward, rank.backward, start, message)
    block_gradients, load = end.block_gradients, end.load
    if directions == 2:
        block_gradients, load = jax.tree.map(home, (block_gradients, load))
    back = functools.partial(weights_of_stages.from_stage, layers=layers)
    block_gradients = jax.tree.map(back, block_gradients, of_blocks)
    shared_gradients = jax.tree.map(weights_of_stages.from_all_stages, end.shared_gradients, of_shared)
    sums = lax.psum(end.sums, AXIS)
    main, mtp, balance = lax.psum((sums.main, sums.mtp, sums.balance), BATCH_AXES)
    return block_gradients, shared_gradients, load, Sums(main, mtp, balance, sums.load)
