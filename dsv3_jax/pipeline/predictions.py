"""The losses of the last stage's micro-batch, which all stages compute together (report sections 2.2, 3.2.1).

The last stage applies the final norm and the MTP modules to its output. All stages then get the hidden states of all
heads, and each multiplies them by its rows of the output head. So the head, its gradients and its products, which are
as large as those of several layers, are divided over the stages.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.modules.balance import Routing
from dsv3_jax.modules.block import BlockInputs, LayerStatistics
from dsv3_jax.modules.embedding import Head
from dsv3_jax.pipeline.executor import AXIS
from dsv3_jax.pipeline.mtp_slots import Blocks, add_to_blocks, read_blocks, tree_of_blocks
from dsv3_jax.pipeline.residuals import TwoPasses
from dsv3_jax.pipeline.weights import gradients_of, with_gradients


class LossWeights(Protocol):
    """The weights of the objective's terms in one step; a stage itself needs that of the balance term."""

    @property
    def balance(self) -> Float[Array, ""]: ...


class BatchTargets(Protocol):
    """The numbers of targets of the whole batch, a pytree that stages hand to the objective."""

    @property
    def real(self) -> Float[Array, ""]: ...


class PredictionLosses(Protocol):
    """(a stage's rows of the head, hidden states of every depth, ...) -> (main loss, MTP loss of every depth).

    The hidden states are those of the main head, then of the MTP depths.
    """

    def __call__(
        self,
        head: Head,
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


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The losses of the last stages' micro-batches, and their gradients.

    Attributes:
      objective, loss_weights, targets: the training objective, its weights, and the targets of the whole batch.
      directions: how many of the pipeline's ranks compute a last stage: one for each direction.
      before_head: final norm and MTP modules: ((params, blocks), (rest, block inputs), [output of the last layer, and
        with MTP the embeddings]) -> ((hidden states of every depth, balance term), load).
      params, rest: their parameters and router biases, without the parameters of the MTP modules' blocks.
      moe: the MoE layers that the rank holds, [layer slot, ...], with the blocks in slots of the last stage.
      blocks: trees of the structure of the blocks.
      head_graph, head_params: structure of the head, and this stage's rows of it.
    """

    objective: StageObjective
    loss_weights: LossWeights
    targets: BatchTargets
    directions: int
    before_head: TwoPasses
    params: nnx.State
    rest: nnx.State
    moe: nnx.State
    blocks: Blocks
    head_graph: Any
    head_params: nnx.State

    @classmethod
    def of(
        cls,
        graph: Any,
        params: nnx.State,
        rest: nnx.State,
        blocks: Blocks,
        objective: StageObjective,
        inputs: BlockInputs,
        h: Float[Array, "parts b T d"],
        **others: Any,
    ) -> Predictions:
        """Returns the losses of a model.

        Args:
          graph: structure of the model without layers, embedding and head.
          inputs, h: the block inputs and the last argument of `before_head`, or their shapes.
          others: the other attributes.
        """

        def before_head(
            weights: tuple[nnx.State, Blocks], others: tuple[nnx.State, BlockInputs], h: Float[Array, "parts b T d"]
        ):
            (params, blocks), (rest, inputs) = weights, others
            model = nnx.merge(graph, params, tree_of_blocks(blocks), rest)
            hidden = model.final_norm(h[0])
            mtp_hidden, statistics = model.multi_token(h[0], hidden, h[-1], inputs)
            routing = LayerStatistics.join(statistics).routing
            load = routing.load if routing else jnp.zeros((0, model.config.n_routed_experts), jnp.int32)
            return ((hidden, *mtp_hidden), objective.balance_term(routing)), load

        passes = TwoPasses.of(before_head, jax.eval_shape(with_gradients, (params, blocks)), (rest, inputs), h)
        return cls(objective=objective, before_head=passes, params=params, rest=rest, blocks=blocks, **others)

    @jax.named_scope("losses")
    def add(
        self,
        own: Bool[Array, ""],
        first: Int[Array, ""],
        h: Float[Array, "parts b T d"],
        micro_batch: tuple[Int[Array, "b T1"], Int[Array, "b T1"], BlockInputs],
        share: Float[Array, ""],
        gradients: tuple[nnx.State, nnx.State, nnx.State],
        sums: LossSums,
    ) -> tuple[tuple[nnx.State, nnx.State, nnx.State], LossSums, Float[Array, "parts b T d"]]:
        """Returns the gradients by weights and the sums, with this tick's added, and the gradients by `h`.

        All stages must call it at the same tick.

        Args:
          own: whether this rank computes a last stage; the next four arguments are read only if it does.
          first: the layer slot of that stage's first block.
          h: the last argument of `before_head`.
          micro_batch: tokens, segment ids and block inputs.
          share: the micro-batch's weight in the balance term.
          gradients: by `params`, `head_params` and `moe`.
        """
        tokens, segment_ids, inputs = micro_batch

        def arguments() -> tuple[Any, Any, Array]:
            blocks = read_blocks(self.moe, self.blocks, first)
            return with_gradients((self.params, blocks)), (self.rest, inputs), h

        def forward() -> Any:
            return self.before_head.forward(*arguments())

        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(forward))
        (hidden, balance), load, residuals = lax.cond(own, forward, lambda: zeros)

        labels = jax.tree.map(lambda leaf: jnp.where(own, leaf, 0), (tokens, segment_ids))
        to_all = functools.partial(to_all_stages, directions=self.directions)
        hidden, labels = jax.tree.map(to_all, (hidden, labels))
        by_head, by_hidden, main, mtp = self._losses(hidden, *labels)
        # All stages compute the same losses; the sum over stages at the end of the step counts those of the first.
        once = lax.axis_index(AXIS) == 0
        main, mtp = jax.tree.map(lambda loss: jnp.where(once, loss, 0), (main, mtp))
        sums = _add(sums, LossSums(main, mtp, share * balance, load))

        bars = (by_hidden, self.loss_weights.balance * share)

        def backward(others: nnx.State, moe: nnx.State) -> tuple[nnx.State, nnx.State, Array]:
            weights_bar, by_h = self.before_head.backward(*arguments(), residuals, bars)
            by_params, by_blocks = gradients_of(weights_bar)
            return _add(others, by_params), add_to_blocks(moe, by_blocks, first), by_h

        others, head, moe = gradients
        others, moe, by_h = lax.cond(own, backward, lambda *same: (*same, jnp.zeros_like(h)), others, moe)
        return (others, _add(head, by_head), moe), sums, by_h

    def _losses(
        self, hidden: tuple[Float[Array, "b _ d"], ...], tokens: Int[Array, "b T1"], segment_ids: Int[Array, "b T1"]
    ) -> tuple[nnx.State, tuple[Float[Array, "b _ d"], ...], Float[Array, ""], Float[Array, " D"]]:
        """Returns gradients by this stage's rows of the head and by its own hidden states, and the losses of all."""

        def loss(params: nnx.State, hidden: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array]]:
            head = nnx.merge(self.head_graph, params)
            main, mtp = self.objective.prediction_losses(head, hidden, tokens, segment_ids, targets=self.targets)
            total = self.objective.total_loss(main, mtp, jnp.zeros_like(main), self.loss_weights)
            return total, (main, mtp)

        value, pull, (main, mtp) = jax.vjp(loss, with_gradients(self.head_params), hidden, has_aux=True)
        by_head, by_hidden = pull(jnp.ones_like(value))
        own = functools.partial(sum_on_last_stages, directions=self.directions)
        return gradients_of(by_head), jax.tree.map(own, by_hidden), main, mtp


def to_all_stages(value: Array, directions: int) -> Array:
    """Returns the values [directions * b, ...] of all last stages, from [b, ...] of each.

    A last stage sends every rank a part of its rows, and all ranks gather the parts.
    """
    flat = value.reshape(-1, *value.shape[2:])
    parts = lax.all_to_all(_in_parts(flat, axis=0), AXIS, split_axis=0, concat_axis=0, tiled=True)
    whole = lax.all_gather(parts[_last_stages(directions)], AXIS, axis=1, tiled=True)
    return whole[:, : flat.shape[0]].reshape(-1, *value.shape[1:])


def sum_on_last_stages(value: Array, directions: int) -> Array:
    """Returns the sum over all ranks of [directions * b, ...]: to a last stage its own [b, ...], to others zeros."""
    flat = value.reshape(directions, -1, *value.shape[2:])
    sums = lax.psum_scatter(_in_parts(flat, axis=1), AXIS, scatter_dimension=1)
    parts = jnp.zeros((lax.axis_size(AXIS), *sums.shape[1:]), sums.dtype).at[_last_stages(directions)].set(sums)
    whole = lax.all_to_all(parts, AXIS, split_axis=0, concat_axis=0, tiled=True)
    whole = whole.reshape(-1, *whole.shape[2:])[: flat.shape[1]]
    return whole.reshape(-1, *value.shape[1:])


def _last_stages(directions: int) -> Int[np.ndarray, " directions"]:
    """Returns the rank of the last stage in every direction."""
    return np.array([lax.axis_size(AXIS) - 1, 0])[:directions]


def _in_parts(rows: Array, axis: int) -> Array:
    """Returns the rows along an axis, padded, as one part for every rank: [..., ranks, rows of a part, ...]."""
    ranks, count = lax.axis_size(AXIS), rows.shape[axis]
    size = -(-count // ranks)
    padding = [(0, size * ranks - count if dimension == axis else 0) for dimension in range(rows.ndim)]
    return jnp.pad(rows, padding).reshape(*rows.shape[:axis], ranks, size, *rows.shape[axis + 1 :])


def _add(total: Any, one: Any) -> Any:
    return jax.tree.map(lambda t, o: t + o.astype(t.dtype), total, one)
