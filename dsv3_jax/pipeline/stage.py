"""What a rank computes at a tick: a stage of the model on its own sequences, and the gradients.

Ranks with other sequences of the same stage communicate where weights are sharded (`sharding.linear_on_ranks`), where
tokens are dispatched to experts, and in the balance statistics. Ranks with other stages of the same sequences look up
embeddings together, because each has some columns of the table, and compute losses together (`pipeline.predictions`).
Gradients stay on their rank; those of replicated weights are summed at the end of the step.

For every micro-batch in flight a rank keeps what the model's rematerialisation policy keeps of each layer
(`pipeline.residuals`), so that no forward pass is computed again for the backward pass. Both parts of a backward pass
that is split read the same residuals. The second part computes the gradients inside the layers again, because it needs
them and the first does not keep them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from dsv3_jax.model import DeepSeekV3
from dsv3_jax.modules.block import BlockInputs
from dsv3_jax.pipeline.predictions import BatchTargets, LossSums, LossWeights, Predictions, StageObjective
from dsv3_jax.pipeline.residuals import Residuals, SlotLayout
from dsv3_jax.pipeline.slots import FOR_INPUT, FOR_WEIGHTS, LOOK_UP, LOOK_UP_GRADIENT, PREDICT, TickEntry
from dsv3_jax.pipeline.stacked_layers import StackedLayers
from dsv3_jax.pipeline.weights import gradients_of
from dsv3_jax.sharding.rules import BATCH_AXES

MOE, DENSE, EMBEDDING, HEAD, OTHERS = "moe_blocks", "dense_blocks", "embedding", "head", "others"
"""Parts of the tree of parameters: two stacks of layers and the vocabulary's weights, by their names, and all else."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StageCarry:
    """What a rank carries from tick to tick.

    Attributes:
      kept: residuals of a stage's layers, as `StageComputation.slot_layout` says: each [slot, entry, ...].
      gradients: gradients by part of the parameters; those of MoE layers by layer slot.
      load: assignments per layer slot and expert.
      sums: loss terms, and the load of the MTP blocks.
      by_embedded: gradient by the embeddings that the MTP modules read in this tick.
    """

    kept: tuple[Array, ...]
    gradients: dict[str, nnx.State]
    load: Int[Array, "slots E"]
    sums: LossSums
    by_embedded: Float[Array, "b T d"]


@dataclasses.dataclass(frozen=True)
class StageComputation:
    """The forward and the backward pass of the stages of one rank, for `executor.run_ticks`.

    A layer slot is an index into the stacked MoE layers that the rank holds: those of its own stage, padded to
    `slots_per_stage`, then, with two directions, those of the opposite rank's stage. On the last stage the blocks of
    the MTP modules follow its layers (`pipeline.mtp_slots`).

    Attributes:
      objective: the training objective.
      moe: the MoE layers, by layer slot.
      dense: all dense layers, which the first stage computes; None if the model has none.
      model: what is left of the model without its layers, its embedding and its head.
      embedding_graph, table: structure of the embedding, and this rank's columns of it.
      predictions: final norm, MTP modules and head.
      slot_layout: where the residuals of layers are in a slot.
      tokens, segment_ids: this rank's sequences of every micro-batch.
      loss_weights: weights of the objective's terms.
      targets: numbers of targets of the whole batch.
      layer_counts: MoE layers of every stage.
      slots_per_stage: layer slots of every stage.
      splits_backward: whether the schedule splits backward passes.
      pairs: whether a rank ever computes a forward and a full backward pass in one tick.
    """

    objective: StageObjective
    moe: StackedLayers
    dense: StackedLayers | None
    model: DeepSeekV3
    embedding_graph: Any
    table: nnx.State
    predictions: Predictions
    slot_layout: SlotLayout
    tokens: Int[Array, "A b T1"]
    segment_ids: Int[Array, "A b T1"]
    loss_weights: LossWeights
    targets: BatchTargets
    layer_counts: Int[Array, " stages"]
    slots_per_stage: int
    splits_backward: bool
    pairs: bool

    def together(
        self, entry: TickEntry, h: Float[Array, "b T d"], g: Float[Array, "b T d"], carry: StageCarry
    ) -> tuple[Float[Array, "b T d"], Float[Array, "b T d"], StageCarry]:
        """Returns a stage's input, the gradient by its output, and the carry with the losses of the last stages.

        Args:
          h: what was received as input; replaced by embeddings on the first stage.
          g: the gradient that was received; on the last stage its output at first, replaced by the gradient.
        """
        tokens, _, _ = self._micro_batch(entry.forward_micro_batch)
        embedded = lax.cond(entry.together & LOOK_UP != 0, lambda: self._embed(self.table, tokens), lambda: h)
        h = jnp.where(entry.forward_stage == 0, embedded, h)

        micro_batch = self._micro_batch(entry.backward_micro_batch)
        last = entry.backward_stage == self.layer_counts.shape[0] - 1
        own = last & (entry.backward_parts & FOR_INPUT != 0)
        share = self._share(micro_batch[1])

        def losses(gradients: tuple[nnx.State, nnx.State, nnx.State], sums: LossSums) -> tuple[Any, LossSums, Array]:
            parts = [g, self._embed(self.table, micro_batch[0])] if self.model.mtp else [g]
            first_block = entry.backward_direction * self.slots_per_stage + self.layer_counts[-1]
            return self.predictions.add(own, first_block, jnp.stack(parts), micro_batch, share, gradients, sums)

        before = carry.gradients
        zeros = jnp.zeros((1 + bool(self.model.mtp), *g.shape), g.dtype)
        (others, head, moe), sums, by_h = lax.cond(
            entry.together & PREDICT != 0,
            losses,
            lambda *same: (*same, zeros),
            (before[OTHERS], before[HEAD], before[MOE]),
            carry.sums,
        )
        gradients = before | {OTHERS: others, HEAD: head, MOE: moe}
        carry = dataclasses.replace(carry, gradients=gradients, sums=sums, by_embedded=by_h[-1])
        return h, jnp.where(own, by_h[0], g), carry

    def compute(
        self, entry: TickEntry, h: Float[Array, "b T d"], g: Float[Array, "b T d"], carry: StageCarry
    ) -> tuple[Float[Array, "b T d"], Float[Array, "b T d"], StageCarry]:
        """Returns a stage's output, the gradient by a stage's input, and the carry.

        Where a rank computes a forward and a full backward pass in one tick, of two micro-batches, it computes a layer
        of one beside a layer of the other, so that the compiler can send the tokens of one while it multiplies those of
        the other (figure 4).

        Args:
          h: input of the stage whose forward pass is computed.
          g: gradient by the output of the stage whose backward pass is computed.
        """
        for_weights = entry.backward_parts & FOR_WEIGHTS != 0
        forward = self._forward_layer(entry)
        _, segment_ids, inputs = self._micro_batch(entry.backward_micro_batch)
        by_balance = self.loss_weights.balance * self._share(segment_ids)
        backward = _BackwardLayer(self.slot_layout, entry.backward_kept_slot, inputs, by_balance)
        forward_count = self._layer_count(entry.forward_stage)
        backward_count = self._layer_count(entry.backward_stage)
        full_count = jnp.where(for_weights, backward_count, 0)
        moe_gradients, dense_gradients = carry.gradients[MOE], carry.gradients[DENSE]
        state = (h, carry.kept, carry.load, carry.sums.balance)

        if (dense := self.dense) is not None:
            with jax.named_scope("forward"):
                on_first = jnp.where(entry.forward_stage == 0, dense.count, 0)
                state = lax.fori_loop(0, on_first, functools.partial(forward, dense, 0), state)
        forward_moe = functools.partial(forward, self.moe, entry.forward_direction * self.slots_per_stage)
        last = entry.backward_direction * self.slots_per_stage, backward_count - 1  # the first slot and the last layer

        paired: Any = 0
        gradients = (g, moe_gradients)
        if self.pairs:

            def pair(step: Any, both: tuple) -> tuple:
                state, gradients, residuals = both
                gradients = backward.pull(self.moe, *last, residuals, step, gradients)
                state = forward_moe(step, state)
                # Read behind the write, because the compiler copies the buffers if it can't tell which is first.
                return state, gradients, backward.read(self.moe, *last, state[1], step + 1)

            paired = jnp.minimum(forward_count, full_count)
            with jax.named_scope("pairs"):
                start = (state, gradients, backward.read(self.moe, *last, state[1], 0))
                state, gradients, _ = lax.fori_loop(0, paired, pair, start)
        with jax.named_scope("forward"):
            h, kept, load, balance = lax.fori_loop(paired, forward_count, forward_moe, state)
        with jax.named_scope("backward"):
            through_moe = functools.partial(backward, self.moe, *last, kept)
            by_input, moe_gradients = lax.fori_loop(paired, full_count, through_moe, gradients)
            if self.splits_backward:
                # No rank receives the gradient by the first stage's input.
                alone = (entry.backward_parts == FOR_INPUT) & (entry.backward_stage != 0)
                count = jnp.where(alone, backward_count, 0)
                by_input = lax.fori_loop(0, count, lambda step, g: through_moe(step, (g, None))[0], by_input)

            of_first_stage = (entry.backward_stage == 0) & for_weights
            by_embedded = by_input
            if dense is not None:
                through_dense = functools.partial(backward, dense, 0, dense.count - 1, kept)
                on_first = jnp.where(of_first_stage, dense.count, 0)
                by_embedded, dense_gradients = lax.fori_loop(0, on_first, through_dense, (by_input, dense_gradients))
            by_table = self._by_table(entry, jnp.where(of_first_stage, by_embedded, 0), carry)
        of_parts = carry.gradients | {MOE: moe_gradients, DENSE: dense_gradients, EMBEDDING: by_table}
        sums = dataclasses.replace(carry.sums, balance=balance)
        return h, by_input, dataclasses.replace(carry, kept=kept, gradients=of_parts, load=load, sums=sums)

    def _forward_layer(self, entry: TickEntry) -> Callable[[StackedLayers, Any, Any, tuple], tuple]:
        """Returns (layers, slot of the stage's first, layer of the stage, state) -> state behind the layer.

        The state is (hidden states, residuals of all slots, load, balance term).
        """
        _, segment_ids, inputs = self._micro_batch(entry.forward_micro_batch)
        share = self._share(segment_ids)

        def layer(layers: StackedLayers, first: Any, i: Any, state: tuple) -> tuple:
            h, kept, load, balance = state
            (h, term), layer_load, residuals = layers.passes.forward(*layers.at(first + i, inputs), h)
            kept = self.slot_layout.write(kept, entry.forward_kept_slot, layers.kind, i, residuals)
            if layer_load is not None:
                load = load.at[first + i].add(layer_load.astype(load.dtype))
                balance = balance + share * term
            return h, kept, load, balance

        return layer

    def _by_table(self, entry: TickEntry, by_embedded: Float[Array, "b T d"], carry: StageCarry) -> nnx.State:
        """Returns the gradients of the embedding with those of this tick, `by_embedded` being of the first layer."""
        tokens, _, _ = self._micro_batch(entry.backward_micro_batch)
        adds = entry.together & LOOK_UP_GRADIENT != 0
        if self.model.mtp:
            by_embedded, adds = by_embedded + carry.by_embedded, adds | (entry.together & PREDICT != 0)
        add_embedding = functools.partial(self._add_embedding, tokens=tokens, by_embedded=by_embedded)
        return lax.cond(adds, add_embedding, lambda total: total, carry.gradients[EMBEDDING])

    def _share(self, segment_ids: Int[Array, "b T1"]) -> Float[Array, ""]:
        """Returns a rank's part of a micro-batch's weight in the balance term, which is the same on all ranks."""
        return lax.pmean(self.objective.share_of_batch(segment_ids, self.targets), BATCH_AXES)

    def _micro_batch(self, m: Int[Array, ""]) -> tuple[Int[Array, "b T1"], Int[Array, "b T1"], BlockInputs]:
        """Returns tokens, segment ids and block inputs of micro-batch `m`; of any one if `m` is -1."""
        m = jnp.maximum(m, 0)
        tokens, segment_ids = (lax.dynamic_index_in_dim(x, m, keepdims=False) for x in (self.tokens, self.segment_ids))
        return tokens, segment_ids, block_inputs(self.model, self.objective, tokens, segment_ids)

    @jax.named_scope("embedding")
    def _embed(self, table: nnx.State, tokens: Int[Array, "b T1"]) -> Float[Array, "b T d"]:
        """Returns the embeddings of a micro-batch, which are the input of the first layer; all stages must call it."""
        return nnx.merge(self.embedding_graph, table)(tokens[:, :-1])

    def _add_embedding(
        self, total: nnx.State, tokens: Int[Array, "b T1"], by_embedded: Float[Array, "b T d"]
    ) -> nnx.State:
        """Returns the gradients of the table with those by a micro-batch's embeddings, in their own dtype.

        All stages must call it; those that looked up nothing with zeros.
        """
        # Of the table only the shape is read, and the dtype of its gradient.
        _, pull = jax.vjp(functools.partial(self._embed, tokens=tokens), total)
        return jax.tree.map(jnp.add, total, pull(by_embedded)[0])

    def _layer_count(self, stage: Int[Array, ""]) -> Int[Array, ""]:
        """Returns how many MoE layers a stage has; 0 for stage -1."""
        return jnp.where(stage >= 0, self.layer_counts[jnp.maximum(stage, 0)], 0)


@dataclasses.dataclass(frozen=True)
class _BackwardLayer:
    """The backward pass of one layer of the stage of an entry.

    Its methods take the slot of the stage's first layer among `layers`, the index of its last layer in the stage, and a
    step: step 0 is the last layer.

    Attributes:
      slot_layout, kept_slot: where the residuals are.
      inputs: the block inputs of the micro-batch.
      by_balance: gradient by a layer's balance term.
    """

    slot_layout: SlotLayout
    kept_slot: Int[Array, ""]
    inputs: BlockInputs
    by_balance: Float[Array, ""]

    def __call__(self, layers: StackedLayers, first: Any, last: Any, kept: Residuals, step: Any, state: tuple) -> tuple:
        """Returns the state behind the layer, as `pull` does, from the residuals of all slots."""
        return self.pull(layers, first, last, self.read(layers, first, last, kept, step), step, state)

    def read(self, layers: StackedLayers, first: Any, last: Any, kept: Residuals, step: Any) -> Residuals:
        """Returns the layer's residuals; any where there is no such layer."""
        del first
        return self.slot_layout.read(kept, self.kept_slot, layers.kind, jnp.maximum(last - step, 0))

    def pull(
        self, layers: StackedLayers, first: Any, last: Any, residuals: Residuals, step: Any, state: tuple
    ) -> tuple[Float[Array, "b T d"], nnx.State | None]:
        """Returns the state behind the layer, from its residuals.

        Args:
          state: gradient by the layer's output, and the gradients by the parameters of all layers; None without them.
        """
        g, total = state
        slot = first + last - step
        by_params, g = layers.passes.backward(*layers.at(slot, self.inputs), g, residuals, (g, self.by_balance))
        if total is not None:
            total = jax.tree.map(lambda all_, one: all_.at[slot].add(one), total, gradients_of(by_params))
        return g, total


def block_inputs(
    model: DeepSeekV3, objective: StageObjective, tokens: Int[Array, "b T1"], segment_ids: Int[Array, "b T1"]
) -> BlockInputs:
    """Returns what all layers are given of a micro-batch besides the hidden state."""
    isolate = objective.isolate_documents
    return model.block_inputs(tokens[:, :-1], None, segment_ids[:, :-1], isolate_segments=isolate)
