"""What a rank computes at a tick: a stage of the model on its own sequences, and the gradients.

Ranks with other sequences of the same stage communicate where weights are sharded (`sharding.linear_on_ranks`), where
tokens are dispatched to experts, and in the balance statistics. Gradients stay on their rank; those of replicated
weights are summed at the end of the step.

For every micro-batch in flight a rank keeps the inputs of the stage's layers. The backward pass recomputes one layer at
a time from its input, whatever rematerialisation the model has. A backward pass that is split in two parts recomputes
each layer in both, because the second part needs the gradients inside the layers, which the first does not keep.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from dsv3_jax.model import DeepSeekV3
from dsv3_jax.modules.balance import Routing
from dsv3_jax.modules.block import BlockInputs, LayerStatistics
from dsv3_jax.pipeline.slots import FOR_INPUT, FOR_WEIGHTS, TickEntry
from dsv3_jax.sharding.rules import BATCH_AXES


class LossWeights(Protocol):
    """The weights of the objective's terms in one step; a stage itself needs that of the balance term."""

    @property
    def balance(self) -> Float[Array, ""]: ...


class BatchTargets(Protocol):
    """The numbers of targets of the whole batch, a pytree that stages hand to the objective."""

    @property
    def real(self) -> Float[Array, ""]: ...


class PredictionLosses(Protocol):
    """(model, hidden states of the main head and of every MTP depth, ...) -> (main loss, MTP loss of every depth)."""

    def __call__(
        self,
        model: DeepSeekV3,
        hidden: tuple[Float[Array, "b _ d"], ...],
        tokens: Int[Array, "b T1"],
        segment_ids: Int[Array, "b T1"],
        *,
        targets: Any,
    ) -> tuple[Float[Array, ""], Float[Array, " D"]]: ...


@dataclasses.dataclass(frozen=True)
class StageObjective:
    """The training objective in the parts that stages compute. Training fills it in (`training.step`).

    Attributes:
      isolate_documents: whether attention and targets stay within a document.
      prediction_losses: losses of the last stage; sums over a micro-batch, divided by the batch's targets.
      balance_term: (routing of some layers, or None) -> their balance term, unweighted.
      share_of_batch: (segment ids of a micro-batch, targets of the batch) -> the weight of the micro-batch's balance
        term in the batch.
      total_loss: (main loss, MTP losses, balance term, weights) -> what is differentiated; linear in all terms.
    """

    isolate_documents: bool
    prediction_losses: PredictionLosses
    balance_term: Callable[[Routing | None], Float[Array, ""]]
    share_of_batch: Callable[[Int[Array, "b T1"], Any], Float[Array, ""]]
    total_loss: Callable[[Array, Array, Array, Any], Float[Array, ""]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossSums:
    """The loss terms of the micro-batches so far, unweighted, and the expert load.

    Attributes:
      main: loss of the main head, in nats, divided by the targets of the batch.
      mtp: the same of each MTP depth.
      balance: balance term, summed over layers.
      load: assignments per layer and expert: inside a stage of the MTP blocks alone; at the end of all MoE layers.
    """

    main: Float[Array, ""]
    mtp: Float[Array, " D"]
    balance: Float[Array, ""]
    load: Int[Array, "layers E"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StageCarry:
    """What a rank carries from tick to tick.

    Attributes:
      kept: inputs of a stage's layers: [slot, layer of the stage, ...].
      block_gradients: gradients of the MoE layers, by layer slot.
      shared_gradients: gradients of all other parameters.
      load: assignments per layer slot and expert.
      sums: loss terms, and the load of the MTP blocks.
    """

    kept: Float[Array, "K L b T d"]
    block_gradients: nnx.State
    shared_gradients: nnx.State
    load: Int[Array, "slots E"]
    sums: LossSums


@dataclasses.dataclass(frozen=True)
class StageComputation:
    """The forward and the backward pass of the stages of one rank, for `executor.run_ticks`.

    A layer slot is an index into the stacked MoE layers that the rank holds: those of its own stage, padded to
    `slots_per_stage`, then, with two directions, those of the opposite rank's stage.

    Attributes:
      objective: the training objective.
      graphs: structure of the MoE layers, and of the rest of the model.
      blocks: parameters and router biases of the MoE layers, by layer slot.
      shared: parameters and router biases of the rest of the model.
      tokens, segment_ids: this rank's sequences of every micro-batch.
      loss_weights: weights of the objective's terms.
      targets: numbers of targets of the whole batch.
      layer_counts: MoE layers of every stage.
      slots_per_stage: MoE layers of the largest stage.
      splits_backward: whether the schedule splits backward passes.
    """

    objective: StageObjective
    graphs: tuple[Any, Any]
    blocks: tuple[nnx.State, nnx.State]
    shared: tuple[nnx.State, nnx.State]
    tokens: Int[Array, "A b T1"]
    segment_ids: Int[Array, "A b T1"]
    loss_weights: LossWeights
    targets: BatchTargets
    layer_counts: Int[Array, " stages"]
    slots_per_stage: int
    splits_backward: bool

    def forward(
        self, entry: TickEntry, h: Float[Array, "b T d"], carry: StageCarry
    ) -> tuple[Float[Array, "b T d"], StageCarry]:
        """Returns a stage's output from its input `h`, and the carry with the inputs of the stage's layers."""
        tokens, segment_ids, inputs = self._micro_batch(entry.forward_micro_batch)
        h = lax.cond(entry.forward_stage == 0, lambda: self._before_layers(self.shared[0], tokens, inputs), lambda: h)
        start = entry.forward_direction * self.slots_per_stage
        share = self._share(segment_ids)

        def layer(i: Any, state: tuple) -> tuple:
            h, kept, load, balance = state
            kept = lax.dynamic_update_slice(kept, h[None, None], _kept_index(entry.forward_kept_slot, i))
            (h, term), layer_load = self._layer(start + i, inputs, self._layer_params(start + i), h)
            return h, kept, load.at[start + i].add(layer_load.astype(load.dtype)), balance + share * term

        state = (h, carry.kept, carry.load, carry.sums.balance)
        h, kept, load, balance = lax.fori_loop(0, self._layer_count(entry.forward_stage), layer, state)
        sums = dataclasses.replace(carry.sums, balance=balance)
        return h, dataclasses.replace(carry, kept=kept, load=load, sums=sums)

    def backward(
        self, entry: TickEntry, g: Float[Array, "b T d"], carry: StageCarry
    ) -> tuple[Float[Array, "b T d"], Float[Array, "b T d"], StageCarry]:
        """Returns the gradient by a stage's input, the gradient by its output, and the carry with those by its weights.

        Args:
          g: gradient by the stage's output; on the last stage at first the output itself (see `executor.Backward`).
        """
        tokens, segment_ids, inputs = self._micro_batch(entry.backward_micro_batch)
        stage = entry.backward_stage
        for_weights = entry.backward_parts & FOR_WEIGHTS != 0
        start = entry.backward_direction * self.slots_per_stage
        shared = self.shared[0]

        def from_loss(total: nnx.State, sums: LossSums, h: Array) -> tuple[nnx.State, LossSums, Array]:
            loss = functools.partial(self._loss, tokens=tokens, segment_ids=segment_ids, inputs=inputs)
            value, pull, terms = jax.vjp(loss, shared, h, has_aux=True)
            by_shared, by_h = pull(jnp.ones_like(value))
            return _add(total, by_shared), _add(sums, terms), by_h

        total, sums, g = lax.cond(
            (stage == self.layer_counts.shape[0] - 1) & (entry.backward_parts & FOR_INPUT != 0),
            from_loss,
            lambda *unchanged: unchanged,
            carry.shared_gradients,
            carry.sums,
            g,
        )

        count = self._layer_count(stage)
        by_balance = self.loss_weights.balance * self._share(segment_ids)

        def layer_input(i: Any) -> Float[Array, "b T d"]:
            return lax.dynamic_slice(carry.kept, _kept_index(entry.backward_kept_slot, i), (1, 1, *g.shape))[0, 0]

        def full_layer(step: Any, state: tuple) -> tuple:
            g, total = state
            i = count - 1 - step
            layer = functools.partial(self._layer, start + i, inputs)
            (_, term), pull, _ = jax.vjp(layer, self._layer_params(start + i), layer_input(i), has_aux=True)
            by_params, g = pull((g, by_balance.astype(term.dtype)))
            return g, jax.tree.map(lambda all_, one: all_.at[start + i].add(one), total, by_params)

        def layer_for_input(step: Any, g: Array) -> Array:
            i = count - 1 - step
            layer = functools.partial(self._layer, start + i, inputs, self._layer_params(start + i))
            (_, term), pull, _ = jax.vjp(layer, layer_input(i), has_aux=True)
            return pull((g, by_balance.astype(term.dtype)))[0]

        by_input, block_gradients = lax.fori_loop(
            0, jnp.where(for_weights, count, 0), full_layer, (g, carry.block_gradients)
        )
        if self.splits_backward:
            # No rank receives the gradient by the first stage's input.
            alone = (entry.backward_parts == FOR_INPUT) & (stage != 0)
            by_input = lax.fori_loop(0, jnp.where(alone, count, 0), layer_for_input, by_input)

        def from_first_layers(total: nnx.State) -> nnx.State:
            _, pull = jax.vjp(lambda shared: self._before_layers(shared, tokens, inputs), shared)
            return _add(total, pull(by_input)[0])

        total = lax.cond((stage == 0) & for_weights, from_first_layers, lambda total: total, total)
        carry = dataclasses.replace(carry, block_gradients=block_gradients, shared_gradients=total, sums=sums)
        return by_input, g, carry

    def _share(self, segment_ids: Int[Array, "b T1"]) -> Float[Array, ""]:
        """Returns a rank's part of a micro-batch's weight in the balance term, which is the same on all ranks."""
        return lax.pmean(self.objective.share_of_batch(segment_ids, self.targets), BATCH_AXES)

    def _shared_model(self, params: nnx.State) -> DeepSeekV3:
        """Returns the model without MoE layers."""
        return nnx.merge(self.graphs[1], params, jax.tree.map(lambda leaf: leaf, self.shared[1]))

    def _micro_batch(self, m: Int[Array, ""]) -> tuple[Int[Array, "b T1"], Int[Array, "b T1"], BlockInputs]:
        """Returns tokens, segment ids and block inputs of micro-batch `m`; of any one if `m` is -1."""
        m = jnp.maximum(m, 0)
        tokens, segment_ids = (lax.dynamic_index_in_dim(x, m, keepdims=False) for x in (self.tokens, self.segment_ids))
        model = self._shared_model(self.shared[0])
        inputs = model.block_inputs(
            tokens[:, :-1], None, segment_ids[:, :-1], isolate_segments=self.objective.isolate_documents
        )
        return tokens, segment_ids, inputs

    @jax.named_scope("embedding_and_dense_layers")
    def _before_layers(
        self, params: nnx.State, tokens: Int[Array, "b T1"], inputs: BlockInputs
    ) -> Float[Array, "b T d"]:
        """Returns the input of the first MoE layer, which the first stage computes."""
        model = self._shared_model(params)
        h = model.embedding(tokens[:, :-1])
        if model.config.num_dense_layers:
            h, _ = model.scan_blocks(model.dense_blocks, h, inputs)
        return h

    @jax.named_scope("losses")
    def _loss(
        self,
        params: nnx.State,
        h: Float[Array, "b T d"],
        tokens: Int[Array, "b T1"],
        segment_ids: Int[Array, "b T1"],
        inputs: BlockInputs,
    ) -> tuple[Float[Array, ""], LossSums]:
        """Returns the losses from the output of the last MoE layer, with the balance term of the MTP blocks."""
        model = self._shared_model(params)
        hidden = model.final_norm(h)
        mtp_hidden, statistics = model.multi_token(h, hidden, model.embedding(tokens[:, :-1]), inputs)
        main, mtp = self.objective.prediction_losses(
            model, (hidden, *mtp_hidden), tokens, segment_ids, targets=self.targets
        )
        joined = LayerStatistics.join(statistics).routing
        balance = self._share(segment_ids) * self.objective.balance_term(joined)
        load = joined.load if joined else jnp.zeros((0, model.config.n_routed_experts), jnp.int32)
        total = self.objective.total_loss(main, mtp, balance, self.loss_weights)
        return total, LossSums(main, mtp, balance, load)

    @jax.named_scope("moe_layer")
    def _layer(
        self, slot: Int[Array, ""], inputs: BlockInputs, params: nnx.State, h: Float[Array, "b T d"]
    ) -> tuple[tuple[Float[Array, "b T d"], Float[Array, ""]], Int[Array, " E"]]:
        """Returns ((output, balance term), load) of the MoE layer in a slot, for `jax.vjp` with `has_aux`."""
        out, statistics = nnx.merge(self.graphs[0], params, _at(self.blocks[1], slot))(h, inputs)
        return (out, self.objective.balance_term(statistics.routing)), statistics.routing.load

    def _layer_params(self, slot: Int[Array, ""]) -> nnx.State:
        return _at(self.blocks[0], slot)

    def _layer_count(self, stage: Int[Array, ""]) -> Int[Array, ""]:
        """Returns how many MoE layers a stage has; 0 for stage -1."""
        return jnp.where(stage >= 0, self.layer_counts[jnp.maximum(stage, 0)], 0)


def _at(stacked: nnx.State, slot: Int[Array, ""]) -> nnx.State:
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, slot, keepdims=False), stacked)


def _kept_index(slot: Int[Array, ""], layer: Int[Array, ""]) -> tuple[Array, ...]:
    """Returns where the input of a layer begins in `StageCarry.kept`."""
    return tuple(jnp.asarray(index, jnp.int32) for index in (slot, layer, 0, 0, 0))


def _add(total: Any, one: Any) -> Any:
    return jax.tree.map(lambda t, o: t + o.astype(t.dtype), total, one)
