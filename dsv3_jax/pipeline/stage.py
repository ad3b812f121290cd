"""What a rank computes at a tick: a stage of the model on its own sequences, and their gradients.

Ranks of a stage that have other sequences meet where weights lie in parts (`sharding.linear_on_ranks`), where tokens
travel to experts, and in the balance statistics. Gradients are a rank's own: what several ranks hold of the same weight
is summed when the step is done.

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
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from dsv3_jax.model import DeepSeekV3
from dsv3_jax.modules.balance import Routing
from dsv3_jax.modules.block import BlockInputs
from dsv3_jax.pipeline.slots import INPUT, WEIGHTS, Lockstep
from dsv3_jax.sharding.rules import BATCH_AXES, AxisRules, parameter_specs
from dsv3_jax.training.config import RunConfig
from dsv3_jax.training.losses import LossWeights, balance_of, prediction_losses, share_of, total_loss

_TENSOR_ONLY = AxisRules(embed=(), latent=(), expert=(), layers=())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
    """A rank's part of the loss terms, and the load of the MTP blocks, of what a rank has computed so far."""

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

    kept: Float[Array, "K L b T d"]
    block_gradients: nnx.State
    shared_gradients: nnx.State
    load: Int[Array, "places E"]
    sums: Sums


def on_tensor_axis(tree: Any, mesh: Mesh) -> Any:
    """Parameters, or what is shaped like them, divided over the one axis that is the compiler's inside a stage."""
    if mesh.shape["tensor"] == 1:
        return tree
    return lax.with_sharding_constraint(tree, parameter_specs(tree, mesh, _TENSOR_ONLY))


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
    tokens: Int[Array, "A b T1"]
    segment_ids: Int[Array, "A b T1"]
    weights: LossWeights
    real_tokens: Float[Array, ""]
    layer_counts: Int[Array, " stages"]
    room: int
    splits: bool

    @property
    def isolate(self) -> bool:
        return self.config.data.isolate_documents

    def share(self, segment_ids: Int[Array, "b T1"]) -> Float[Array, ""]:
        """What every rank counts of a micro-batch's balance term, which is the same on all of them."""
        return lax.pmean(share_of(segment_ids, self.real_tokens), BATCH_AXES)

    def model(self, shared: nnx.State) -> DeepSeekV3:
        """The model without MoE layers."""
        return nnx.merge(self.graphs[1], shared, jax.tree.map(lambda leaf: leaf, self.others[1]))

    def micro_batch(self, m: Int[Array, ""]) -> tuple[Int[Array, "b T1"], Int[Array, "b T1"], BlockInputs]:
        m = jnp.maximum(m, 0)
        tokens, segment_ids = (lax.dynamic_index_in_dim(x, m, keepdims=False) for x in (self.tokens, self.segment_ids))
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1] - 1), (tokens.shape[0], tokens.shape[1] - 1))
        inputs = self.model(self.others[0]).block_inputs(positions, segment_ids[:, :-1], isolate_segments=self.isolate)
        return tokens, segment_ids, inputs

    def first(self, shared: nnx.State, tokens: Int[Array, "b T1"], inputs: BlockInputs) -> Float[Array, "b T d"]:
        """Embedding and dense layers."""
        model = self.model(shared)
        h = model.embedding(tokens[:, :-1])
        if self.config.model.num_dense_layers:
            h, _ = model.scan_blocks(model.dense_blocks, h, inputs)
        return h

    def last(
        self,
        shared: nnx.State,
        h: Float[Array, "b T d"],
        tokens: Int[Array, "b T1"],
        segment_ids: Int[Array, "b T1"],
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
            chunk=self.config.training.loss_chunk,
        )
        joined = Routing.join(routing) if routing else None
        balance = self.share(segment_ids) * balance_of(joined, self.config.training.balance)
        load = joined.load if joined else jnp.zeros((0, self.config.model.n_routed_experts), jnp.int32)
        return total_loss(main, mtp, balance, self.weights), Sums(main, mtp, balance, load)

    def parameters(self, place: Int[Array, ""]) -> nnx.State:
        """Of the MoE layer at a place."""
        return _at(self.blocks[0], place)

    def layer(
        self, place: Int[Array, ""], inputs: BlockInputs, params: nnx.State, h: Float[Array, "b T d"]
    ) -> tuple[tuple[Float[Array, "b T d"], Float[Array, ""]], Int[Array, " E"]]:
        """A MoE layer: its output and balance term, and its load."""
        out, routing = nnx.merge(self.graphs[0], params, _at(self.blocks[1], place))(h, inputs)
        return (out, balance_of(routing, self.config.training.balance)), routing.load

    def forward(
        self, at: Lockstep, h: Float[Array, "b T d"], progress: Progress
    ) -> tuple[Float[Array, "b T d"], Progress]:
        """A stage's output from its input; layer inputs are kept."""
        tokens, segment_ids, inputs = self.micro_batch(at.forward)
        h = lax.cond(at.forward_stage == 0, lambda: self.first(self.others[0], tokens, inputs), lambda: h)
        start = at.forward_direction * self.room
        share = self.share(segment_ids)

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
        self, at: Lockstep, g: Float[Array, "b T d"], progress: Progress
    ) -> tuple[Float[Array, "b T d"], Float[Array, "b T d"], Progress]:
        """Gradients by a stage's input, its weights, or both, from that by its output, which comes back too."""
        tokens, segment_ids, inputs = self.micro_batch(at.backward_micro_batch)
        stage = at.backward_stage
        by_weights = at.backward & WEIGHTS != 0
        start = at.backward_direction * self.room
        shared = self.others[0]

        def from_loss(total: nnx.State, sums: Sums, h: Array) -> tuple[nnx.State, Sums, Array]:
            loss = functools.partial(self.last, tokens=tokens, segment_ids=segment_ids, inputs=inputs)
            value, pull, terms = jax.vjp(loss, shared, h, has_aux=True)
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
        by_balance = self.weights.balance * self.share(segment_ids)

        def input_of(i: Any) -> Float[Array, "b T d"]:
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
            _, pull = jax.vjp(lambda shared: self.first(shared, tokens, inputs), shared)
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
