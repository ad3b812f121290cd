"""What a rank of the stage axis computes at a tick: stages of the model, and their gradients.

Kept of every micro-batch in flight are the inputs of a stage's layers; the backward pass computes each layer anew,
one at a time, whatever the model's own rematerialisation. A backward pass that is split into its two halves computes
the layers anew in both, since the second needs the gradients inside the layers that the first has let go.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from dsv3_jax.model import DeepSeekV3
from dsv3_jax.modules.block import BlockInputs
from dsv3_jax.modules.routing_statistics import Routing
from dsv3_jax.sharding.pipeline_tables import INPUT, WEIGHTS, Lockstep
from dsv3_jax.sharding.rules import BATCH_AXES, WITHIN_A_STAGE, parameter_specs
from dsv3_jax.training.config import RunConfig
from dsv3_jax.training.losses import LossWeights, balance_of, prediction_losses, share_of, weighted


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
    """Loss terms, and the load of the MTP blocks, of what a rank has computed so far."""

    main: Float[Array, ""]
    mtp: Float[Array, " D"]
    balance: Float[Array, ""]
    load: Int[Array, "D E"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Progress:
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
    sums: Sums


def on_batch_axes(x: Array, axis: int) -> Array:
    return lax.with_sharding_constraint(x, PartitionSpec(*[None] * axis, BATCH_AXES))


def laid_out(tree: Any, mesh: Mesh) -> Any:
    """Parameters, or what is shaped like them, divided inside a stage as the rules say."""
    return lax.with_sharding_constraint(tree, parameter_specs(tree, mesh, WITHIN_A_STAGE))


def _gathered(tree: Any, mesh: Mesh) -> Any:
    """Parameters with the routers' put together along the fsdp axis, as their products want them.

    The compiler would mostly do so by itself. Where it does not it may move activations by a permutation among all
    devices, in which those of stages that do something else at that tick would never take part. Linear maps, experts
    and embedding say themselves how they are used on a mesh.
    """
    specs = parameter_specs(tree, mesh, dataclasses.replace(WITHIN_A_STAGE, embed=()))

    def gathered(path: tuple[Any, ...], leaf: Array, spec: PartitionSpec) -> Array:
        if "['router']" not in jax.tree_util.keystr(path):
            return leaf
        return lax.with_sharding_constraint(leaf, spec)

    return jax.tree_util.tree_map_with_path(gathered, tree, specs)


@dataclasses.dataclass(frozen=True)
class StageComputation:
    """What a rank computes at a tick.

    Attributes:
      graphs: structure of the MoE blocks and of the rest of the model.
      blocks: parameters and router biases of the layers, by place.   others: of the rest.
      layer_counts: layers of every stage.   room: places of a stage's layers.
      splits: whether the schedule splits backward passes.
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
    splits: bool
    mesh: Mesh

    @property
    def isolate(self) -> bool:
        return self.config.data.isolate_documents

    def model(self, shared: nnx.State) -> DeepSeekV3:
        """The model without MoE layers."""
        return nnx.merge(self.graphs[1], shared, jax.tree.map(lambda leaf: leaf, self.others[1]))

    def micro_batch(self, m: Int[Array, ""]) -> tuple[Int[Array, "B T1"], Int[Array, "B T1"], BlockInputs]:
        m = jnp.maximum(m, 0)
        tokens, segment_ids = (
            on_batch_axes(lax.dynamic_index_in_dim(x, m, keepdims=False), 0) for x in (self.tokens, self.segment_ids)
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
    ) -> tuple[Float[Array, ""], Sums]:
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
        return weighted(main, mtp, balance, self.weights), Sums(main, mtp, balance, load)

    def parameters(self, place: Int[Array, ""]) -> nnx.State:
        """Of the MoE layer at a place."""
        return _gathered(_at(self.blocks[0], place), self.mesh)

    def layer(
        self, place: Int[Array, ""], inputs: BlockInputs, params: nnx.State, h: Float[Array, "B T d"]
    ) -> tuple[tuple[Float[Array, "B T d"], Float[Array, ""]], Int[Array, " E"]]:
        """A MoE layer: its output and balance term, and its load."""
        out, routing = nnx.merge(self.graphs[0], params, _at(self.blocks[1], place))(h, inputs)
        return (out, balance_of(routing, self.config.training.balance)), routing.load

    def forward(
        self, at: Lockstep, h: Float[Array, "B T d"], progress: Progress
    ) -> tuple[Float[Array, "B T d"], Progress]:
        """A stage's output from its input; layer inputs are kept."""
        tokens, segment_ids, inputs = self.micro_batch(at.forward)
        h = lax.cond(
            at.forward_stage == 0, lambda: self.first(_gathered(self.others[0], self.mesh), tokens, inputs), lambda: h
        )
        start = at.forward_direction * self.room
        share = share_of(segment_ids, self.real_tokens)

        def layer(i: Any, carry: tuple) -> tuple:
            h, kept, load, balance = carry
            kept = lax.dynamic_update_slice(kept, h[None, None], _place(at.forward_kept, i))
            (h, term), layer_load = self.layer(start + i, inputs, self.parameters(start + i), h)
            return h, kept, load.at[start + i].add(layer_load.astype(load.dtype)), balance + share * term

        carry = (h, progress.kept, progress.load, progress.sums.balance)
        h, kept, load, balance = lax.fori_loop(0, self._layers(at.forward_stage), layer, carry)
        sums = dataclasses.replace(progress.sums, balance=balance)
        return h, dataclasses.replace(progress, kept=kept, load=load, sums=sums)

    def backward(
        self, at: Lockstep, g: Float[Array, "B T d"], progress: Progress
    ) -> tuple[Float[Array, "B T d"], Float[Array, "B T d"], Progress]:
        """Gradients by a stage's input, its weights, or both, from that by its output, which comes back too."""
        tokens, segment_ids, inputs = self.micro_batch(at.backward_micro_batch)
        stage = at.backward_stage
        by_weights = at.backward & WEIGHTS != 0
        start = at.backward_direction * self.room
        shared = self.others[0]

        def from_loss(total: nnx.State, sums: Sums, h: Array) -> tuple[nnx.State, Sums, Array]:
            loss = functools.partial(self.last, tokens=tokens, segment_ids=segment_ids, inputs=inputs)
            value, pull, terms = jax.vjp(loss, _gathered(shared, self.mesh), h, has_aux=True)
            by_shared, by_h = pull(jnp.ones_like(value))
            return _added(total, by_shared), _added(sums, terms), by_h

        total, sums, g = lax.cond(
            (stage == self.layer_counts.shape[0] - 1) & (at.backward & INPUT != 0),
            from_loss,
            lambda *as_they_are: as_they_are,
            progress.shared_gradients,
            progress.sums,
            g,
        )

        count = self._layers(stage)
        by_balance = self.weights.balance * share_of(segment_ids, self.real_tokens)

        def input_of(i: Any) -> Float[Array, "B T d"]:
            return lax.dynamic_slice(progress.kept, _place(at.backward_kept, i), (1, 1, *g.shape))[0, 0]

        def both(step: Any, carry: tuple) -> tuple:
            g, total = carry
            i = count - 1 - step
            layer = functools.partial(self.layer, start + i, inputs)
            (_, term), pull, _ = jax.vjp(layer, self.parameters(start + i), input_of(i), has_aux=True)
            by_params, g = pull((g, by_balance.astype(term.dtype)))
            return g, jax.tree.map(lambda all_, one: all_.at[start + i].add(one), total, by_params)

        def input_only(step: Any, g: Array) -> Array:
            i = count - 1 - step
            layer = functools.partial(self.layer, start + i, inputs, self.parameters(start + i))
            (_, term), pull, _ = jax.vjp(layer, input_of(i), has_aux=True)
            return pull((g, by_balance.astype(term.dtype)))[0]

        by_input, block_gradients = lax.fori_loop(
            0, jnp.where(by_weights, count, 0), both, (g, progress.block_gradients)
        )
        if self.splits:
            # The first stage hands its input's gradient to no one.
            only = (at.backward == INPUT) & (stage != 0)
            by_input = lax.fori_loop(0, jnp.where(only, count, 0), input_only, by_input)

        def from_first(total: nnx.State) -> nnx.State:
            _, pull = jax.vjp(lambda shared: self.first(shared, tokens, inputs), _gathered(shared, self.mesh))
            return _added(total, pull(by_input)[0])

        total = lax.cond((stage == 0) & by_weights, from_first, lambda total: total, total)
        progress = dataclasses.replace(progress, block_gradients=block_gradients, shared_gradients=total, sums=sums)
        return by_input, g, progress

    def _layers(self, stage: Int[Array, ""]) -> Int[Array, ""]:
        return jnp.where(stage >= 0, self.layer_counts[jnp.maximum(stage, 0)], 0)


def _at(stacked: nnx.State, place: Int[Array, ""]) -> nnx.State:
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, place, keepdims=False), stacked)


def _place(micro_batch: Int[Array, ""], layer: Int[Array, ""]) -> tuple[Array, ...]:
    """Where a layer's input begins among those that are kept."""
    return tuple(jnp.asarray(index, jnp.int32) for index in (micro_batch, layer, 0, 0, 0))


def _added(total: Any, one: Any) -> Any:
    return jax.tree.map(lambda t, o: t + o.astype(t.dtype), total, one)
