"""Gradients of a batch whose micro-batches go through pipeline stages (report section 3.2.1).

The MoE layers are divided over the ranks of the stage axis. Everything else is on every rank: the first stage uses
embedding and dense layers, the last one final norm, MTP modules and head. Each stage's balance terms are
differentiated where they arise. The other axes of the mesh work inside a stage as they do without a pipeline.

Kept of every micro-batch in flight are the inputs of a stage's layers; the backward pass computes each layer anew,
one at a time, whatever the model's own rematerialisation. A backward pass that is split into its two halves computes
the layers anew in both, since the second needs the gradients inside the layers that the first has let go.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from dsv3_jax.model import DeepSeekV3
from dsv3_jax.modules.block import BlockInputs
from dsv3_jax.modules.routing_statistics import Routing
from dsv3_jax.sharding.pipeline_executor import AXIS, run_lockstep
from dsv3_jax.sharding.pipeline_schedules import ScheduleName, make_schedule
from dsv3_jax.sharding.pipeline_tables import INPUT, WEIGHTS, Lockstep, Places, lockstep, moe_layers_of_stages
from dsv3_jax.sharding.rules import BATCH_AXES
from dsv3_jax.training.config import RunConfig
from dsv3_jax.training.losses import LossTerms, LossWeights, balance_of, prediction_losses, share_of, weighted
from dsv3_jax.training.state import Skeleton

PipelinedPass = Callable[..., tuple[nnx.State, LossTerms]]


def make_pipelined_pass(
    skeleton: Skeleton, config: RunConfig, mesh: Mesh, schedule_name: ScheduleName
) -> PipelinedPass:
    """(params, biases, tokens [A, B, T+1], segment_ids [A, B, T+1], weights, real_tokens) -> (gradients, terms).

    Both are the sums over the A passes that training without a pipeline arrives at, up to the order of float32 sums.

    Raises:
      ConfigError: more stages than MoE layers, or, when it is traced, passes that the schedule cannot place.
    """
    layers = moe_layers_of_stages(config.model, mesh.shape[AXIS])
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
            chunk=config.training.loss_chunk * int(np.prod([mesh.shape[axis] for axis in BATCH_AXES])),
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
        )(tables, arranged, (shared, rest), tokens, segment_ids, weights, real_tokens, jnp.asarray(layers))
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


def _places_of_layers(layers: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Which layer lies at every place, each stage having as many as the fullest; and the place of every layer."""
    room, starts = max(layers), np.cumsum((0, *layers))
    in_place = [starts[s] + i if i < n else 0 for s, n in enumerate(layers) for i in range(room)]
    out_of_place = [s * room + i for s, n in enumerate(layers) for i in range(n)]
    return np.array(in_place), np.array(out_of_place)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Sums:
    """Loss terms, and the load of the MTP blocks, of what a rank has computed so far."""

    main: Float[Array, ""]
    mtp: Float[Array, " D"]
    balance: Float[Array, ""]
    load: Int[Array, "D E"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Progress:
    """What a rank carries from tick to tick. Places of layers: those of its stage, then of the one opposite.

    Attributes:
      kept: inputs of a stage's layers, of every micro-batch in flight.
      block_gradients: of the layers.   shared_gradients: of all else.
      load: of the layers.
    """

    kept: Float[Array, "K L B T d"]
    block_gradients: nnx.State
    shared_gradients: nnx.State
    load: Int[Array, "places E"]
    sums: _Sums


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
) -> tuple[nnx.State, nnx.State, Int[Array, "L E"], _Sums]:
    """One rank's part: gradients of its layers and, summed over ranks, of all else; load and loss terms."""
    ranks, room = len(layers), max(layers)
    opposite = [(rank, ranks - 1 - rank) for rank in range(ranks)]

    def with_opposite(leaf: Array) -> Array:
        return jnp.concatenate([leaf, lax.ppermute(leaf, AXIS, opposite)])

    def home(leaf: Array) -> Array:
        return leaf[:room] + lax.ppermute(leaf[room:], AXIS, opposite)

    if directions == 2:
        arranged = jax.tree.map(with_opposite, arranged)
    rank = _Rank(config, graphs, arranged, others, tokens, segment_ids, weights, real_tokens, layer_counts, room, chunk)
    model = rank.model(others[0])
    experts, depth = config.model.n_routed_experts, config.model.num_nextn_predict_layers
    shape = (tokens.shape[1], tokens.shape[2] - 1, config.model.hidden_size)
    message = _on_batch_axes(jnp.zeros(shape, model.precision.dtype), 0)
    zero = jnp.zeros(())
    start = _Progress(
        kept=_on_batch_axes(jnp.zeros((places.kept, room, *shape), message.dtype), 2),
        block_gradients=jax.tree.map(jnp.zeros_like, arranged[0]),
        shared_gradients=jax.tree.map(jnp.zeros_like, others[0]),
        load=jnp.zeros((directions * room, experts), jnp.int32),
        sums=_Sums(zero, jnp.zeros((depth,)), zero, jnp.zeros((depth, experts), jnp.int32)),
    )
    end = run_lockstep(tables, places, mine, rank.forward, rank.backward, start, message)
    block_gradients, load = end.block_gradients, end.load
    if directions == 2:
        block_gradients, load = jax.tree.map(home, (block_gradients, load))
    shared_gradients, sums = lax.psum((end.shared_gradients, end.sums), AXIS)
    return block_gradients, shared_gradients, load, sums


def _on_batch_axes(x: Array, axis: int) -> Array:
    return lax.with_sharding_constraint(x, PartitionSpec(*[None] * axis, BATCH_AXES))


@dataclasses.dataclass(frozen=True)
class _Rank:
    """What a rank computes at a tick.

    Attributes:
      graphs: structure of the MoE blocks and of the rest of the model.
      blocks: parameters and router biases of the layers, by place.   others: of the rest.
      layer_counts: layers of every stage.   room: places of a stage's layers.
    """

    config: RunConfig
    graphs: tuple[Any, Any]
    blocks: tuple[nnx.State, nnx.State]
    others: tuple[nnx.State, nnx.State]
    tokens: Int[Array, "A B T1"]
    segment_ids: Int[Array, "A B T1"]
    weights: LossWeights
    real_tokens: Float[Array, ""]
    layer_counts: Int[Array, " stages"]
    room: int
    chunk: int

    @property
    def isolate(self) -> bool:
        return self.config.data.isolate_documents

    def model(self, shared: nnx.State) -> DeepSeekV3:
        """The model without MoE layers."""
        return nnx.merge(self.graphs[1], shared, jax.tree.map(lambda leaf: leaf, self.others[1]))

    def micro_batch(self, m: Int[Array, ""]) -> tuple[Int[Array, "B T1"], Int[Array, "B T1"], BlockInputs]:
        m = jnp.maximum(m, 0)
        tokens, segment_ids = (
            _on_batch_axes(lax.dynamic_index_in_dim(x, m, keepdims=False), 0) for x in (self.tokens, self.segment_ids)
        )
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1] - 1), (tokens.shape[0], tokens.shape[1] - 1))
        inputs = self.model(self.others[0]).block_inputs(positions, segment_ids[:, :-1], isolate_segments=self.isolate)
        return tokens, segment_ids, inputs

    def first(self, shared: nnx.State, tokens: Int[Array, "B T1"], inputs: BlockInputs) -> Float[Array, "B T d"]:
        """Embedding and dense layers."""
        model = self.model(shared)
        h = model.embedding(tokens[:, :-1])
        if self.config.model.num_dense_layers:
            h, _ = model.scan_blocks(model.dense_blocks, h, inputs)
        return h

    def last(
        self,
        shared: nnx.State,
        h: Float[Array, "B T d"],
        tokens: Int[Array, "B T1"],
        segment_ids: Int[Array, "B T1"],
        inputs: BlockInputs,
    ) -> tuple[Float[Array, ""], _Sums]:
        """The losses from the output of the last layer, with the MTP blocks' balance."""
        model = self.model(shared)
        hidden = model.final_norm(h)
        mtp_hidden, routing = model.multi_token(h, hidden, model.embedding(tokens[:, :-1]), inputs)
        main, mtp = prediction_losses(
            model,
            (hidden, *mtp_hidden),
            tokens,
            segment_ids,
            real_tokens=self.real_tokens,
            isolate_segments=self.isolate,
            chunk=self.chunk,
        )
        joined = Routing.join(routing) if routing else None
        balance = share_of(segment_ids, self.real_tokens) * balance_of(joined, self.config.training.balance)
        load = joined.load if joined else jnp.zeros((0, self.config.model.n_routed_experts), jnp.int32)
        return weighted(main, mtp, balance, self.weights), _Sums(main, mtp, balance, load)

    def layer(
        self, place: Int[Array, ""], inputs: BlockInputs, params: nnx.State, h: Float[Array, "B T d"]
    ) -> tuple[tuple[Float[Array, "B T d"], Float[Array, ""]], Int[Array, " E"]]:
        """A MoE layer: its output and balance term, and its load."""
        out, routing = nnx.merge(self.graphs[0], params, _at(self.blocks[1], place))(h, inputs)
        return (out, balance_of(routing, self.config.training.balance)), routing.load

    def forward(
        self, at: Lockstep, h: Float[Array, "B T d"], progress: _Progress
    ) -> tuple[Float[Array, "B T d"], _Progress]:
        """A stage's output from its input; layer inputs are kept."""
        tokens, segment_ids, inputs = self.micro_batch(at.forward)
        h = lax.cond(at.forward_stage == 0, lambda: self.first(self.others[0], tokens, inputs), lambda: h)
        start = at.forward_direction * self.room
        share = share_of(segment_ids, self.real_tokens)

        def layer(i: Any, carry: tuple) -> tuple:
            h, kept, load, balance = carry
            kept = lax.dynamic_update_slice(kept, h[None, None], (at.forward_kept, i, 0, 0, 0))
            (h, term), layer_load = self.layer(start + i, inputs, _at(self.blocks[0], start + i), h)
            return h, kept, load.at[start + i].add(layer_load), balance + share * term

        carry = (h, progress.kept, progress.load, progress.sums.balance)
        h, kept, load, balance = lax.fori_loop(0, self._layers(at.forward_stage), layer, carry)
        sums = dataclasses.replace(progress.sums, balance=balance)
        return h, dataclasses.replace(progress, kept=kept, load=load, sums=sums)

    def backward(
        self, at: Lockstep, g: Float[Array, "B T d"], progress: _Progress
    ) -> tuple[Float[Array, "B T d"], _Progress]:
        """Gradients by a stage's input, its weights, or both, from that by its output."""
        tokens, segment_ids, inputs = self.micro_batch(at.backward_micro_batch)
        stage = at.backward_stage
        by_weights = at.backward & WEIGHTS != 0
        start = at.backward_direction * self.room
        shared = self.others[0]
        total = progress.shared_gradients

        def from_loss(total: nnx.State, sums: _Sums, h: Array) -> tuple[nnx.State, _Sums, Array]:
            loss = functools.partial(self.last, tokens=tokens, segment_ids=segment_ids, inputs=inputs)
            value, pull, terms = jax.vjp(loss, shared, h, has_aux=True)
            by_shared, by_h = pull(jnp.ones_like(value))
            # A split backward pass comes by twice.
            sums = jax.tree.map(lambda s, t: jnp.where(at.backward & INPUT != 0, s + t, s), sums, terms)
            return jax.tree.map(jnp.add, total, by_shared), sums, by_h

        def loss_by_input(total: nnx.State, sums: _Sums, h: Array) -> tuple[nnx.State, _Sums, Array]:
            loss = functools.partial(self.last, shared, tokens=tokens, segment_ids=segment_ids, inputs=inputs)
            value, pull, terms = jax.vjp(loss, h, has_aux=True)
            return total, jax.tree.map(jnp.add, sums, terms), pull(jnp.ones_like(value))[0]

        def arrived(total: nnx.State, sums: _Sums, g: Array) -> tuple[nnx.State, _Sums, Array]:
            return total, sums, g

        is_last = (stage == self.layer_counts.shape[0] - 1) & (at.backward != 0)
        branch = jnp.where(is_last, jnp.where(by_weights, 1, 2), 0)
        total, sums, g = lax.switch(branch, (arrived, from_loss, loss_by_input), total, progress.sums, g)

        count = self._layers(stage)
        by_balance = self.weights.balance * share_of(segment_ids, self.real_tokens)

        def input_of(i: Any) -> Float[Array, "B T d"]:
            return lax.dynamic_slice(progress.kept, (at.backward_kept, i, 0, 0, 0), (1, 1, *g.shape))[0, 0]

        def both(step: Any, carry: tuple) -> tuple:
            g, total = carry
            i = count - 1 - step
            layer = functools.partial(self.layer, start + i, inputs)
            (_, term), pull, _ = jax.vjp(layer, _at(self.blocks[0], start + i), input_of(i), has_aux=True)
            by_params, g = pull((g, by_balance.astype(term.dtype)))
            return g, jax.tree.map(lambda all_, one: all_.at[start + i].add(one), total, by_params)

        def input_only(step: Any, g: Array) -> Array:
            i = count - 1 - step
            layer = functools.partial(self.layer, start + i, inputs, _at(self.blocks[0], start + i))
            (_, term), pull, _ = jax.vjp(layer, input_of(i), has_aux=True)
            return pull((g, by_balance.astype(term.dtype)))[0]

        # The first stage hands its input's gradient to no one.
        only = (at.backward == INPUT) & (stage != 0)
        by_input = lax.fori_loop(0, jnp.where(only, count, 0), input_only, g)
        g, block_gradients = lax.fori_loop(0, jnp.where(by_weights, count, 0), both, (g, progress.block_gradients))

        def from_first(total: nnx.State) -> nnx.State:
            _, pull = jax.vjp(lambda shared: self.first(shared, tokens, inputs), shared)
            return jax.tree.map(jnp.add, total, pull(g)[0])

        total = lax.cond((stage == 0) & by_weights, from_first, lambda total: total, total)
        progress = dataclasses.replace(progress, block_gradients=block_gradients, shared_gradients=total, sums=sums)
        return jnp.where(only, by_input, g), progress

    def _layers(self, stage: Int[Array, ""]) -> Int[Array, ""]:
        return jnp.where(stage >= 0, self.layer_counts[jnp.maximum(stage, 0)], 0)


def _at(stacked: nnx.State, place: Int[Array, ""]) -> nnx.State:
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, place, keepdims=False), stacked)
