"""One optimizer step, as a pure function."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.errors import ConfigError
from dsv3_jax.modules.balance import dead_experts, max_violation, update_biases
from dsv3_jax.pipeline.executor import AXIS
from dsv3_jax.pipeline.passes import check_passes, make_pipelined_pass
from dsv3_jax.pipeline.predictions import StageObjective
from dsv3_jax.pipeline.slots import moe_layers_of_stages
from dsv3_jax.sharding.compiler_options import compiler_options
from dsv3_jax.sharding.rules import BATCH_AXES
from dsv3_jax.training.adapters import Adapters, with_adapters
from dsv3_jax.training.config import RunConfig
from dsv3_jax.training.distillation import Teacher, divergences
from dsv3_jax.training.losses import (
    BatchTargets,
    LossTerms,
    LossWeights,
    balance_of,
    objective,
    prediction_losses,
    share_of,
    total_loss,
)
from dsv3_jax.training.optimizer import make_optimizer, update_average
from dsv3_jax.training.preferences import count_pairs, preference_objective
from dsv3_jax.training.qk_clip import LargestLogits, clip_logits
from dsv3_jax.training.state import Skeleton, TrainState, split_trained
from dsv3_jax.training.state_layout import StateLayout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepSettings:
    """The values of the schedules for one step: float32 arrays, so that a new value never causes a recompilation."""

    learning_rate: Float[Array, ""]
    bias_update_speed: Float[Array, ""]
    balance_weight: Float[Array, ""]
    mtp_weight: Float[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """The metrics of one step.

    Attributes:
      loss, main_loss, mtp_loss: in nats per token: the total, the main head's, and one number per MTP depth.
      balance_loss: the balance term, not weighted, summed over layers.
      gradient_norm: norm of the whole gradient before clipping.
      max_violation: MaxVio, averaged over layers.
      dead_experts: number of experts that no token reached, summed over layers.
      load: assignments of tokens to each expert of each layer.
      applied: whether the step was applied, which it is if loss and gradient are finite.
      nonfinite_steps: how many steps in a row, this one included, were not applied.
      largest_logit: the largest attention logit of all heads before the update; None where not measured.
      distillation_loss: divergence from the teacher, in nats per token; None without a teacher.
    """

    loss: Float[Array, ""]
    main_loss: Float[Array, ""]
    mtp_loss: Float[Array, " D"]
    balance_loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    max_violation: Float[Array, ""]
    dead_experts: Int[Array, ""]
    load: Int[Array, "layers E"]
    applied: Bool[Array, ""]
    nonfinite_steps: Int[Array, ""]
    largest_logit: Float[Array, ""] | None
    distillation_loss: Float[Array, ""] | None


TrainStep = Callable[..., tuple[TrainState, StepMetrics]]


def make_train_step(
    skeleton: Skeleton, config: RunConfig, layout: StateLayout | None = None, teacher: Teacher | None = None
) -> TrainStep:
    """Returns the jitted step: (state, tokens [A, B, T+1], segment_ids [A, B, T+1], settings) -> (state, metrics).

    The gradients of A passes of B sequences are accumulated in float32. The state is donated. If the loss or the
    gradient is not finite, nothing is applied: parameters, optimizer, average and router biases stay as they were.

    Args:
      layout: the sharding of the state and of the batch; one device unless given.
      teacher: a model whose distribution is learned too, as `config.teacher` says.

    Raises:
      ConfigError: there are pipeline stages, and the configuration needs something that pipelines do not compute.
    """
    layout = layout or StateLayout()
    training = config.training
    optimizer = make_optimizer(training, config.moment_dtype, config.model)
    isolate = config.data.isolate_documents
    of_pairs = config.data.form == "preferences"

    def loss_of(
        trained: nnx.State,
        kept: nnx.State,
        biases: Float[Array, "layers E"],
        tokens: Int[Array, "B T1"],
        segment_ids: Int[Array, "B T1"],
        weights: LossWeights,
        targets: BatchTargets,
        taught_by: tuple[nnx.State, Float[Array, "layers E"]] | None = None,
    ) -> tuple[Float[Array, ""], LossTerms]:
        model, chunk = skeleton.model(nnx.merge_state(trained, kept), biases), training.loss_chunk * layout.token_ranks
        compare = None
        if taught_by is not None and teacher is not None:
            other = teacher.skeleton.model(*taught_by)
            hidden = other.features(tokens[:, :-1], segment_ids=segment_ids[:, :-1], isolate_segments=isolate).hidden
            compare = functools.partial(
                divergences, model, other, teachers_hidden=hidden, top_k=config.teacher.top_k, chunk=chunk
            )
        common: dict[str, Any] = {"weights": weights, "targets": targets, "balance": training.balance}
        common["measure_logits"] = bool(training.qk_clip)
        if of_pairs:
            terms = preference_objective(model, tokens, segment_ids, **common)
        else:
            terms = objective(
                model,
                tokens,
                segment_ids,
                isolate_segments=isolate,
                chunk=chunk,
                teacher_weight=config.teacher.weight,
                divergences=compare,
                **common,
            )
        return terms.total, terms

    def differentiate(
        params: nnx.State,
        biases: Float[Array, "layers E"],
        tokens: Int[Array, "A B T1"],
        segment_ids: Int[Array, "A B T1"],
        weights: LossWeights,
        targets: BatchTargets,
        taught_by: tuple[nnx.State, Float[Array, "layers E"]] | None = None,
    ) -> tuple[nnx.State, LossTerms]:
        def one_pass(tokens: Int[Array, "B T1"], segment_ids: Int[Array, "B T1"]) -> tuple[nnx.State, LossTerms]:
            compute = jax.grad(loss_of, has_aux=True)
            return compute(*split_trained(params), biases, tokens, segment_ids, weights, targets, taught_by)

        return accumulate(one_pass, tokens, segment_ids)

    if layout.mesh is not None and layout.stages > 1:
        if teacher is not None or of_pairs:
            what = "teacher.run" if teacher is not None else "a reward model"
            raise ConfigError(f"{what} cannot be trained in a pipeline: give a mesh without mesh.stage")
        differentiate = make_pipelined_gradients(skeleton, config, layout.mesh)

    @functools.partial(jax.jit, donate_argnums=0, compiler_options=compiler_options(layout.mesh))
    def train_step(
        state: TrainState,
        tokens: Int[Array, "A B T1"],
        segment_ids: Int[Array, "A B T1"],
        settings: StepSettings,
        *taught_by: tuple[nnx.State, Float[Array, "layers E"]],
    ) -> tuple[TrainState, StepMetrics]:
        if layout.stages > 1 and jax.tree.leaves(split_trained(state.params)[1]):
            raise ConfigError("a pipeline cannot train a model with weights kept in FP8; load it without keep_fp8")
        weights = LossWeights(balance=settings.balance_weight, mtp=settings.mtp_weight)
        depths = config.model.num_nextn_predict_layers
        targets = BatchTargets.count(segment_ids, depths, isolate_segments=isolate)
        if of_pairs:
            targets = count_pairs(segment_ids)

        batch = (state.router_biases, tokens, segment_ids, weights, targets, *taught_by)
        if state.adapters is None:
            gradients, terms = differentiate(state.params, *batch)
            gradients = layout.constrain_gradients(gradients)
        else:
            merge = functools.partial(with_adapters, state.params, lora=config.lora)
            merged, to_adapters = jax.vjp(merge, state.adapters)
            gradients, terms = differentiate(merged, *batch)
            (gradients,) = to_adapters(layout.constrain_gradients(gradients))
        norm = optax.global_norm(gradients)
        finite = jnp.isfinite(terms.total) & jnp.isfinite(norm)

        biases = state.router_biases
        if biases.shape[0]:
            biases = update_biases(biases, terms.load, settings.bias_update_speed)
        new_state = updated(
            state, gradients, biases, finite, settings.learning_rate, optimizer, config, terms.largest_logits
        )
        metrics = StepMetrics(
            loss=terms.total,
            main_loss=terms.main,
            mtp_loss=terms.mtp,
            balance_loss=terms.balance,
            gradient_norm=norm,
            max_violation=jnp.mean(max_violation(terms.load)) if terms.load.shape[0] else jnp.zeros(()),
            dead_experts=jnp.sum(dead_experts(terms.load)),
            load=terms.load,
            applied=finite,
            nonfinite_steps=new_state.nonfinite_steps,
            distillation_loss=terms.distillation,
            largest_logit=None if terms.largest_logits is None else jnp.max(terms.largest_logits.values),
        )
        return layout.constrain_state(new_state), layout.replicate(metrics)

    if teacher is None:
        return train_step
    # As arguments, because arrays that a compiled program closes over are constants in it.
    return lambda *arguments: train_step(*arguments, (teacher.params, teacher.biases))


def updated[State: TrainState](
    state: State,
    gradients: nnx.State | Adapters,
    biases: Float[Array, "layers E"],
    finite: Bool[Array, ""],
    learning_rate: Float[Array, ""],
    optimizer: optax.GradientTransformation,
    config: RunConfig,
    largest_logits: LargestLogits | None,
) -> State:
    """Returns the state after a step; where it is not `finite`, only the counts of steps differ from the old state.

    Args:
      gradients: of the parameters that training changes, or of the adapters if there are any.
      biases: the new router biases.
      largest_logits: of the step's forward pass, by which heads are clipped after the update; None for no clipping.
    """
    trained, kept = split_trained(state.params)
    before = trained if state.adapters is None else state.adapters
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, before)
    after = jax.tree.map(lambda p, u: p - learning_rate * u.astype(p.dtype), before, updates)
    if largest_logits is not None:
        after = clip_logits(after, largest_logits, config.training.qk_clip, config.model)
    params, adapters = state.params, state.adapters
    if adapters is None:
        trained = after
        params = nnx.merge_state(trained, kept)
    else:
        adapters = after
    average = state.average
    if average is not None:
        average = update_average(split_trained(average)[0], trained, config.training.ema_decay, state.step)
        average = nnx.merge_state(average, kept)
    new = (params, optimizer_state, average, biases, adapters)
    old = (state.params, state.optimizer, state.average, state.router_biases, state.adapters)
    chosen = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
    params, optimizer_state, average, biases, adapters = chosen
    return dataclasses.replace(
        state,
        params=params,
        optimizer=optimizer_state,
        average=average,
        router_biases=biases,
        step=state.step + 1,
        nonfinite_steps=jnp.where(finite, 0, state.nonfinite_steps + 1),
        adapters=adapters,
    )


def make_pipelined_gradients(
    skeleton: Skeleton, config: RunConfig, mesh: Mesh
) -> Callable[..., tuple[nnx.State, LossTerms]]:
    """Returns (params, biases, tokens, segment_ids, weights, targets) -> (gradients, terms), through a pipeline.

    Raises:
      ConfigError: more stages than MoE layers, a full batch whose micro-batches the schedule cannot run, or QK-clip.
    """
    training, stages = config.training, mesh.shape["stage"]
    if training.qk_clip:
        raise ConfigError("training.qk_clip does not measure logits in a pipeline: give a mesh without mesh.stage")
    layers = moe_layers_of_stages(config.model, stages)
    check_passes(
        training.pipeline_schedule,
        stages,
        batch_size=training.batch_size,
        rows_per_pass=training.rows_per_pass,
        batch_ranks=math.prod(mesh.shape[axis] for axis in BATCH_AXES),
    )
    isolate = config.data.isolate_documents
    stage_objective = StageObjective(
        isolate_documents=isolate,
        # A stage has one of `stages` parts of the logits, and so those of more tokens at a time.
        prediction_losses=functools.partial(
            prediction_losses, isolate_segments=isolate, chunk=training.loss_chunk * stages, rows_over=AXIS
        ),
        balance_term=functools.partial(balance_of, balance=training.balance),
        share_of_batch=share_of,
        total_loss=total_loss,
    )
    run = make_pipelined_pass(skeleton.model, stage_objective, mesh, training.pipeline_schedule, layers)

    def differentiate(
        params: nnx.State,
        biases: Float[Array, "layers E"],
        tokens: Int[Array, "A B T1"],
        segment_ids: Int[Array, "A B T1"],
        weights: LossWeights,
        targets: BatchTargets,
    ) -> tuple[nnx.State, LossTerms]:
        gradients, sums = run(params, biases, tokens, segment_ids, weights, targets)
        total = total_loss(sums.main, sums.mtp, sums.balance, weights)
        return gradients, LossTerms(total, sums.main, sums.mtp, sums.balance, sums.load)

    return differentiate


def accumulate[Sums](one_pass: Callable[..., Sums], *batch: Any) -> Sums:
    """Returns what one_pass(*pass) returns (gradients, loss terms, loads), summed over the passes of a batch.

    Of `LargestLogits` it returns the largest.

    Args:
      batch: pytrees of arrays whose first axis is the passes.
    """
    first = jax.tree.map(lambda leaf: leaf[0], batch)
    if jax.tree.leaves(batch)[0].shape[0] == 1:
        return one_pass(*first)

    def together(total: Any, one: Any) -> Any:
        combine = jnp.maximum if isinstance(total, LargestLogits) else jnp.add
        return jax.tree.map(combine, total, one)

    def add(total: Sums, one: tuple) -> tuple[Sums, None]:
        whole = jax.tree.map(together, total, one_pass(*one), is_leaf=lambda leaf: isinstance(leaf, LargestLogits))
        return whole, None

    shapes = jax.eval_shape(one_pass, *first)
    start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = lax.scan(add, start, batch)
    return total
