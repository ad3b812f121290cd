"""What a rank computes at a tick: a stage of the model on its own sequences, and the gradients.

Ranks with other sequences of the same stage communicate where weights are sharded (`sharding.linear_on_ranks`), where
tokens are dispatched to experts, and in the balance statistics. Gradients stay on their rank; those of replicated
weights are summed at the end of the step.

For every micro-batch in flight a rank keeps what the model's rematerialisation policy keeps of each layer
(`pipeline.residuals`), so that no forward pass is computed again for the backward pass. Both parts of a backward pass
that is split read the same residuals. The second part computes the gradients inside the layers again, because it needs
them and the first does not keep them.
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
from dsv3_jax.pipeline.residuals import SlotLayout
from dsv3_jax.pipeline.slots import FOR_INPUT, FOR_WEIGHTS, TickEntry
from dsv3_jax.pipeline.stacked_layers import StackedLayers
from dsv3_jax.pipeline.weights import gradients_of, with_gradients
from dsv3_jax.sharding.rules import BATCH_AXES

MOE, DENSE, SHARED = "moe_blocks", "dense_blocks", "shared"
"""Parts of the tree of parameters: two stacks of layers, by their names in it, and all else."""


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
      kept: residuals of a stage's layers, as `StageComputation.slot_layout` says: each [slot, entry, ...].
      gradients: gradients by part of the parameters; those of MoE layers by layer slot.
      load: assignments per layer slot and expert.
      sums: loss terms, and the load of the MTP blocks.
    """

    kept: tuple[Array, ...]
    gradients: dict[str, nnx.State]
    load: Int[Array, "slots E"]
    sums: LossSums


@dataclasses.dataclass(frozen=True)
class StageComputation:
    """The forward and the backward pass of the stages of one rank, for `executor.run_ticks`.

    A layer slot is an index into the stacked MoE layers that the rank holds: those of its own stage, padded to
    `slots_per_stage`, then, with two directions, those of the opposite rank's stage.

    Attributes:
      objective: the training objective.
      moe: the MoE layers, by layer slot.
      dense: all dense layers, which the first stage computes; None if the model has none.
      graph: structure of the rest of the model.
      shared: parameters and router biases of the rest of the model.
      slot_layout: where the residuals of layers are in a slot.
      tokens, segment_ids: this rank's sequences of every micro-batch.
      loss_weights: weights of the objective's terms.
      targets: numbers of targets of the whole batch.
      layer_counts: MoE layers of every stage.
      slots_per_stage: MoE layers of the largest stage.
      splits_backward: whether the schedule splits backward passes.
    """

    objective: StageObjective
    moe: StackedLayers
    dense: StackedLayers | None
    graph: Any
    shared: tuple[nnx.State, nnx.State]
    slot_layout: SlotLayout
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
        """Returns a stage's output from its input `h`, and the carry with the residuals of the stage's layers."""
        tokens, segment_ids, inputs = self._micro_batch(entry.forward_micro_batch)
        h = lax.cond(entry.forward_stage == 0, lambda: self._embed(self.shared[0], tokens), lambda: h)
        start = entry.forward_direction * self.slots_per_stage
        share = self._share(segment_ids)

        def run(layers: StackedLayers, slot: Any, i: Any, h: Array, kept: tuple[Array, ...]) -> tuple:
            outputs, load, residuals = layers.passes.forward(*layers.at(slot, inputs), h)
            return *outputs, load, self.slot_layout.write(kept, entry.forward_kept_slot, layers.kind, i, residuals)

        def moe_layer(i: Any, state: tuple) -> tuple:
            h, kept, load, balance = state
            h, term, layer_load, kept = run(self.moe, start + i, i, h, kept)
            return h, kept, load.at[start + i].add(layer_load.astype(load.dtype)), balance + share * term

        kept = carry.kept
        if (dense := self.dense) is not None:

            def dense_layer(i: Any, state: tuple) -> tuple:
                h, _, _, kept = run(dense, i, i, *state)
                return h, kept

            h, kept = lax.fori_loop(0, jnp.where(entry.forward_stage == 0, dense.count, 0), dense_layer, (h, kept))
        state = (h, kept, carry.load, carry.sums.balance)
        h, kept, load, balance = lax.fori_loop(0, self._layer_count(entry.forward_stage), moe_layer, state)
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
            embedded = self._embed(shared, tokens)
            value, pull, terms = jax.vjp(loss, with_gradients(shared), h, embedded, has_aux=True)
            by_shared, by_h, by_embedded = pull(jnp.ones_like(value))
            total = self._add_embedding(_add(total, gradients_of(by_shared)), tokens, by_embedded)
            return total, _add(sums, terms), by_h

        total, sums, g = lax.cond(
            (stage == self.layer_counts.shape[0] - 1) & (entry.backward_parts & FOR_INPUT != 0),
            from_loss,
            lambda *unchanged: unchanged,
            carry.gradients[SHARED],
            carry.sums,
            g,
        )

        by_balance = self.loss_weights.balance * self._share(segment_ids)

        def pull(layers: StackedLayers, slot: Any, i: Any, g: Array) -> tuple[nnx.State, Array]:
            residuals = self.slot_layout.read(carry.kept, entry.backward_kept_slot, layers.kind, i)
            return layers.passes.backward(*layers.at(slot, inputs), g, residuals, (g, by_balance))

        def through(
            layers: StackedLayers, first: Any, count: Any, state: tuple[Array, nnx.State]
        ) -> tuple[Array, nnx.State]:
            """Returns the gradient by the input of `count` layers, and `total` with those by their parameters."""

            def layer(step: Any, state: tuple[Array, nnx.State]) -> tuple[Array, nnx.State]:
                g, total = state
                i = count - 1 - step
                by_params, g = pull(layers, first + i, i, g)
                by_params = gradients_of(by_params)
                return g, jax.tree.map(lambda all_, one: all_.at[first + i].add(one), total, by_params)

            return lax.fori_loop(0, count, layer, state)

        count = self._layer_count(stage)
        by_input, moe_gradients = through(self.moe, start, jnp.where(for_weights, count, 0), (g, carry.gradients[MOE]))
        if self.splits_backward:
            # No rank receives the gradient by the first stage's input.
            alone = (entry.backward_parts == FOR_INPUT) & (stage != 0)

            def layer_for_input(step: Any, g: Array) -> Array:
                i = count - 1 - step
                return pull(self.moe, start + i, i, g)[1]

            by_input = lax.fori_loop(0, jnp.where(alone, count, 0), layer_for_input, by_input)

        of_first_stage = (stage == 0) & for_weights
        by_embedded, dense_gradients = by_input, carry.gradients[DENSE]
        if (dense := self.dense) is not None:
            dense_count = jnp.where(of_first_stage, dense.count, 0)
            by_embedded, dense_gradients = through(dense, 0, dense_count, (by_input, dense_gradients))

        add_embedding = functools.partial(self._add_embedding, tokens=tokens, by_embedded=by_embedded)
        total = lax.cond(of_first_stage, add_embedding, lambda total: total, total)
        gradients = {MOE: moe_gradients, DENSE: dense_gradients, SHARED: total}
        carry = dataclasses.replace(carry, gradients=gradients, sums=sums)
        return by_input, g, carry

    def _share(self, segment_ids: Int[Array, "b T1"]) -> Float[Array, ""]:
        """Returns a rank's part of a micro-batch's weight in the balance term, which is the same on all ranks."""
        return lax.pmean(self.objective.share_of_batch(segment_ids, self.targets), BATCH_AXES)

    def _shared_model(self, params: nnx.State) -> DeepSeekV3:
        """Returns the model without its layers."""
        return nnx.merge(self.graph, params, jax.tree.map(lambda leaf: leaf, self.shared[1]))

    def _micro_batch(self, m: Int[Array, ""]) -> tuple[Int[Array, "b T1"], Int[Array, "b T1"], BlockInputs]:
        """Returns tokens, segment ids and block inputs of micro-batch `m`; of any one if `m` is -1."""
        m = jnp.maximum(m, 0)
        tokens, segment_ids = (lax.dynamic_index_in_dim(x, m, keepdims=False) for x in (self.tokens, self.segment_ids))
        model = self._shared_model(self.shared[0])
        return tokens, segment_ids, block_inputs(model, self.objective, tokens, segment_ids)

    @jax.named_scope("embedding")
    def _embed(self, params: nnx.State, tokens: Int[Array, "b T1"]) -> Float[Array, "b T d"]:
        """Returns the embeddings of a micro-batch, which are the input of the first layer."""
        return self._shared_model(params).embedding(tokens[:, :-1])

    def _add_embedding(
        self, total: nnx.State, tokens: Int[Array, "b T1"], by_embedded: Float[Array, "b T d"]
    ) -> nnx.State:
        """Returns the gradients of all shared parameters, with those of the embedding added up in their own dtype."""

        def embed(table: nnx.State) -> Float[Array, "b T d"]:
            return self._embed(nnx.State({**self.shared[0], "embedding": table}), tokens)

        like = total["embedding"]  # of the table only the shape is read, and the dtype of its gradient
        _, pull = jax.vjp(embed, like)
        added = _add(like, pull(by_embedded)[0])
        return jax.tree.unflatten(jax.tree.structure(total), jax.tree.leaves(nnx.State({**total, "embedding": added})))

    @jax.named_scope("losses")
    def _loss(
        self,
        params: nnx.State,
        h: Float[Array, "b T d"],
        embedded: Float[Array, "b T d"],
        tokens: Int[Array, "b T1"],
        segment_ids: Int[Array, "b T1"],
        inputs: BlockInputs,
    ) -> tuple[Float[Array, ""], LossSums]:
        """Returns the losses from the output of the last MoE layer, with the balance term of the MTP blocks.

        Args:
          embedded: embeddings of the tokens, for the MTP modules.
        """
        model = self._shared_model(params)
        hidden = model.final_norm(h)
        mtp_hidden, statistics = model.multi_token(h, hidden, embedded, inputs)
        main, mtp = self.objective.prediction_losses(
            model, (hidden, *mtp_hidden), tokens, segment_ids, targets=self.targets
        )
        joined = LayerStatistics.join(statistics).routing
        balance = self._share(segment_ids) * self.objective.balance_term(joined)
        load = joined.load if joined else jnp.zeros((0, model.config.n_routed_experts), jnp.int32)
        total = self.objective.total_loss(main, mtp, balance, self.loss_weights)
        return total, LossSums(main, mtp, balance, load)

    def _layer_count(self, stage: Int[Array, ""]) -> Int[Array, ""]:
        """Returns how many MoE layers a stage has; 0 for stage -1."""
        return jnp.where(stage >= 0, self.layer_counts[jnp.maximum(stage, 0)], 0)


def block_inputs(
    model: DeepSeekV3, objective: StageObjective, tokens: Int[Array, "b T1"], segment_ids: Int[Array, "b T1"]
) -> BlockInputs:
    """Returns what all layers are given of a micro-batch besides the hidden state."""
    isolate = objective.isolate_documents
    return model.block_inputs(tokens[:, :-1], None, segment_ids[:, :-1], isolate_segments=isolate)


def _add(total: Any, one: Any) -> Any:
    return jax.tree.map(lambda t, o: t + o.astype(t.dtype), total, one)
