"""One step of training as a pure function (report section 4.2; balancing as in section 2.1.2).

A batch is A micro-batches, whose gradients and expert loads are added up before anything moves: the result does not
depend on how the batch was cut. A step whose loss or gradient is not finite changes nothing but the counters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from dsv3_jax.training import balance
from dsv3_jax.training.losses import LossConfig, Losses, micro_batch_losses
from dsv3_jax.training.optimizer import OptimizerConfig, make_optimizer, update_average
from dsv3_jax.training.schedules import Schedules
from dsv3_jax.training.state import ModelTemplate, TrainState
from dsv3_jax.training.token_count import add_tokens, tokens_as_float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch for one step: A micro-batches of B sequences, ids as in `dsv3_jax.data` (0 is padding)."""

    tokens: Int[Array, "A B T+1"]
    segment_ids: Int[Array, "A B T+1"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """What a step reports; losses and gradient norm as computed, whether or not the step was applied."""

    losses: Losses
    gradient_norm: Float[Array, ""]
    applied: Bool[Array, ""]
    learning_rate: Float[Array, ""]
    mtp_weight: Float[Array, ""]
    bias_update_speed: Float[Array, ""]
    load: Int[Array, "layers E"]
    max_violation: Float[Array, " layers"]
    load_entropy: Float[Array, " layers"]
    dead_experts: Int[Array, ""]
    consecutive_nonfinite: Int[Array, ""]


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]


def make_train_step(
    template: ModelTemplate,
    schedules: Schedules,
    *,
    loss: LossConfig,
    optimizer: OptimizerConfig,
) -> TrainStep:
    """The training step, ready for `jax.jit(..., donate_argnums=0)`."""
    transformation = make_optimizer(optimizer)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        at = tokens_as_float(state.tokens)
        mtp_weight = schedules.mtp_loss_weight(at)
        totals = _accumulate(
            template, state, batch, loss, mtp_weight=mtp_weight, balance_weight=schedules.balance_loss_weight(at)
        )
        norm = optax.global_norm(totals.gradient)
        applied = jnp.isfinite(norm) & jnp.isfinite(totals.losses.total)
        learning_rate = schedules.learning_rate(_midpoint(at, batch))
        speed = schedules.bias_update_speed(at)
        moved = _move(state, totals, transformation, optimizer, learning_rate, speed)
        kept = jax.tree.map(lambda new, old: jnp.where(applied, new, old), moved, _movable(state))
        streak = jnp.where(applied, 0, state.consecutive_nonfinite + 1)
        sequences = batch.tokens.shape[0] * batch.tokens.shape[1]
        new_state = dataclasses.replace(
            state,
            **kept,
            step=state.step + 1,
            tokens=add_tokens(state.tokens, sequences * (batch.tokens.shape[2] - 1)),
            consecutive_nonfinite=streak,
        )
        metrics = StepMetrics(
            losses=totals.losses,
            gradient_norm=norm,
            applied=applied,
            learning_rate=learning_rate,
            mtp_weight=mtp_weight,
            bias_update_speed=speed,
            load=totals.load,
            max_violation=balance.max_violation(totals.load),
            load_entropy=balance.load_entropy(totals.load),
            dead_experts=balance.dead_experts(totals.load),
            consecutive_nonfinite=streak,
        )
        return new_state, metrics

    return train_step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Totals:
    """Sums over micro-batches."""

    gradient: PyTree[Float[Array, "..."]]
    losses: Losses
    load: Int[Array, "layers E"]


def _accumulate(
    template: ModelTemplate,
    state: TrainState,
    batch: Batch,
    config: LossConfig,
    *,
    mtp_weight: Float[Array, ""],
    balance_weight: Float[Array, ""],
) -> _Totals:
    """Gradient, losses and expert loads of the whole batch, one micro-batch at a time."""
    target_count = _count_targets(batch, config)
    token_count = jnp.maximum(jnp.sum(batch.segment_ids[..., :-1] != 0), 1).astype(jnp.float32)

    def total_loss(params: PyTree[Array], tokens: Array, segment_ids: Array) -> tuple[Array, tuple[Losses, Array]]:
        losses, features = micro_batch_losses(
            template.model(params, state.router_biases),
            tokens,
            segment_ids,
            config=config,
            target_count=target_count,
            token_count=token_count,
            mtp_weight=mtp_weight,
            balance_weight=balance_weight,
        )
        load = _no_load(template) if features.routing is None else features.routing.load
        return losses.total, (losses, load)

    def micro_step(micro_batch: Batch) -> _Totals:
        gradient, (losses, load) = jax.grad(total_loss, has_aux=True)(
            state.params, micro_batch.tokens, micro_batch.segment_ids
        )
        return _Totals(gradient, losses, load)

    first = jax.tree.map(lambda leaf: leaf[0], batch)
    if batch.tokens.shape[0] == 1:
        return micro_step(first)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(micro_step, first))

    def add(totals: _Totals, micro_batch: Batch) -> tuple[_Totals, None]:
        return jax.tree.map(jnp.add, totals, micro_step(micro_batch)), None

    return lax.scan(add, zeros, batch)[0]


def _count_targets(batch: Batch, config: LossConfig) -> Float[Array, ""]:
    source, target = batch.segment_ids[..., :-1], batch.segment_ids[..., 1:]
    wanted = (source != 0) & (target != 0)
    if config.isolate_segments:
        wanted &= source == target
    return jnp.maximum(jnp.sum(wanted), 1).astype(jnp.float32)


def _no_load(template: ModelTemplate) -> Int[Array, "0 E"]:
    del template
    return jnp.zeros((0, 1), jnp.int32)


def _midpoint(tokens: Float[Array, ""], batch: Batch) -> Float[Array, ""]:
    """Tokens at the middle of the step, so that the first step of a warm-up from 0 is not a step of 0."""
    sequences = batch.tokens.shape[0] * batch.tokens.shape[1]
    return tokens + 0.5 * sequences * (batch.tokens.shape[2] - 1)


def _movable(state: TrainState) -> dict[str, Any]:
    """What only a finite step changes."""
    return {name: getattr(state, name) for name in ("params", "optimizer", "average", "router_biases")}


def _move(
    state: TrainState,
    totals: _Totals,
    transformation: optax.GradientTransformation,
    config: OptimizerConfig,
    learning_rate: Float[Array, ""],
    bias_speed: Float[Array, ""],
) -> dict[str, Any]:
    """The optimizer's step, the weights' average and the balancing biases, as `_movable` names them."""
    direction, optimizer_state = transformation.update(totals.gradient, state.optimizer, state.params)
    params = jax.tree.map(lambda p, d: p - learning_rate * d, state.params, direction)
    average = state.average
    if average is not None and config.ema_decay is not None:
        average = update_average(average, params, state.step, config.ema_decay)
    biases = state.router_biases
    if biases.shape[0]:
        biases = balance.update_biases(biases, totals.load, bias_speed)
    return {"params": params, "optimizer": optimizer_state, "average": average, "router_biases": biases}
