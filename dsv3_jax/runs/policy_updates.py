"""The updates of a policy from one rollout: log-probabilities of the old policy, minibatches, epochs."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dsv3_jax.model import DeepSeekV3
from dsv3_jax.post_training.config import ReinforcementConfig
from dsv3_jax.post_training.grpo import Completions
from dsv3_jax.post_training.policy_step import PolicyMetrics, PolicyState, make_log_probs, make_policy_step
from dsv3_jax.post_training.rollouts import Rollout
from dsv3_jax.runs.checkpoints import abstract_state, make_model
from dsv3_jax.training.config import RunConfig
from dsv3_jax.training.state import Skeleton
from dsv3_jax.training.state_layout import StateLayout

Tree = Any
"""A pytree of arrays whose first axes are passes and rows."""


class PolicyUpdates:
    """Computes the updates of a policy.

    Args:
      skeleton: the model without its parameters.
      config, settings: those of the run.
      layout: the sharding of states and batches.
    """

    def __init__(self, skeleton: Skeleton, config: RunConfig, settings: ReinforcementConfig, layout: StateLayout):
        self._skeleton, self._config, self._settings, self._layout = skeleton, config, settings, layout
        self._plain = skeleton if layout.mesh is None else abstract_state(config, lambda: make_model(config))[0]
        self._replays = settings.replay_experts and config.model.num_moe_layers > 0
        self._log_probs = make_log_probs(skeleton, config, layout)
        self._take_step = make_policy_step(
            skeleton,
            config,
            settings.objective,
            longest=settings.rollout.max_new_tokens,
            layout=layout,
            donate=not settings.one_step_behind,
        )

    def model(self, state: PolicyState) -> DeepSeekV3:
        """Returns the policy for the engine: on one device the same arrays, of a mesh a copy on its first device."""
        return self._plain.model(*self._layout.on_one_device((state.params, state.router_biases)))

    def take(
        self, state: PolicyState, rollout: Rollout, step: int, learning_rate: float, *, compare_routing: bool
    ) -> tuple[PolicyState, list[PolicyMetrics], dict[str, float]]:
        """Returns the state after the updates, the metrics of each, and numbers about the rollout.

        Args:
          step: number of the step, which decides the order of groups.
          compare_routing: whether log-probabilities with and without the engine's experts are compared, if they are
            replayed. This takes one more forward pass.
        """
        began = time.perf_counter()
        texts, completions = rollout.batch(
            divide_by_deviation=self._settings.objective.divide_by_deviation,
            experts=self._replays,
            context_ranks=self._config.mesh.context,
        )
        settings, numbers = self._settings, {}
        all_passes = self._in_passes(texts)
        old = None
        if settings.updates > 1 or (self._replays and compare_routing):
            old = self._gathered(self._log_probs(state.params, state.router_biases, all_passes))
        if self._replays and compare_routing and old is not None:
            own = self._log_probs(state.params, state.router_biases, dataclasses.replace(all_passes, experts=None))
            numbers |= _compared(old, self._gathered(own), completions)
        if settings.updates > 1:
            completions = dataclasses.replace(completions, old=old)
        if state.reference is not None:
            reference = self._gathered(self._log_probs(state.reference, state.router_biases, all_passes))
            completions = dataclasses.replace(completions, reference=reference)
        numbers["seconds_comparing"] = time.perf_counter() - began
        metrics = []
        for epoch in range(settings.epochs):
            for rows in self._minibatches(step, epoch):
                batch = jax.tree.map(lambda leaf, rows=rows: leaf[:, rows], (texts, completions))
                texts_of, completions_of = self._in_passes(batch)
                state, each = self._take_step(state, texts_of, completions_of, jnp.float32(learning_rate))
                metrics.append(jax.device_get(each))
        if settings.reference_every and (step + 1) % settings.reference_every == 0:
            state = dataclasses.replace(state, reference=jax.tree.map(jnp.copy, state.params))
        return state, metrics, numbers

    def _minibatches(self, step: int, epoch: int) -> np.ndarray:
        """Returns the rows of each minibatch: whole groups, in a random order if there are several."""
        rollout, count = self._settings.rollout, self._settings.minibatches
        order = np.arange(rollout.prompts)
        if count > 1:
            order = np.random.default_rng([rollout.seed, step, epoch]).permutation(order)
        rows = order[:, None] * rollout.group + np.arange(rollout.group)
        return rows.reshape(count, -1)

    def _in_passes(self, batch: Tree) -> Tree:
        """Returns rows [1, N, ...], which every process has, as passes [A, N / A, ...] over all devices."""
        each, feed = self._config.training.rows_per_pass, self._layout.feed
        return jax.tree.map(
            lambda leaf: feed.put_from_whole(leaf.reshape(-1, each, *leaf.shape[2:]), pass_axis=True), batch
        )

    def _gathered(self, values: Float[jax.Array, "A N T"]) -> Float[np.ndarray, "1 rows T"]:
        return np.asarray(values).reshape(1, -1, values.shape[-1])


def _compared(
    replayed: Float[np.ndarray, "1 N T"], own: Float[np.ndarray, "1 N T"], completions: Completions
) -> dict[str, float]:
    """Returns how far the trainer is from the engine without its experts, and what they change, in nats per token."""
    mask, drawn = np.asarray(completions.mask), np.asarray(completions.drawn)
    return {
        "drawn_difference_own_experts": float(np.mean(np.abs(own - drawn)[mask])),
        "replay_difference": float(np.mean(np.abs(own - replayed)[mask])),
    }
