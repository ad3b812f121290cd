"""Compares a policy update on a mesh of eight simulated devices with one device. Prints JSON."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
from small_models import small_model
from small_runs import VOCABULARY, small_run

from dsv3_jax.post_training.grpo import Completions, GRPOConfig
from dsv3_jax.post_training.policy_step import PolicyMetrics, PolicyState, Texts, make_log_probs, make_policy_step
from dsv3_jax.runs.reinforcement_start import policy_state
from dsv3_jax.runs.starting_state import starting_state
from dsv3_jax.sharding.mesh import MeshConfig
from dsv3_jax.training.state_layout import StateLayout

ROWS, LENGTH = 8, 13
CONFIG = small_run(batch_size=ROWS, micro_batch_size=0, ema_decay=0.0, loss_chunk=32)
CONFIG = dataclasses.replace(
    CONFIG,
    model=CONFIG.model.replace(
        num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0, initializer_range=0.2
    ),
)


def update_on(layout: StateLayout) -> tuple[PolicyState, PolicyMetrics, np.ndarray]:
    random = np.random.default_rng(0)
    tokens = random.integers(0, VOCABULARY, (1, ROWS, LENGTH)).astype(np.int32)
    lengths = random.integers(6, LENGTH + 1, (1, ROWS)).astype(np.int32)
    mask = (np.arange(LENGTH - 1) >= 3) & (np.arange(LENGTH - 1) < lengths[..., None] - 1)
    experts = np.argsort(random.random((1, ROWS, LENGTH - 1, 1, CONFIG.model.n_routed_experts)), axis=-1)
    experts = experts[..., : CONFIG.model.num_experts_per_tok].astype(np.int16)
    logs = (-5 - random.random((2, 1, ROWS, LENGTH - 1))).astype(np.float32)
    advantages = random.normal(size=(1, ROWS)).astype(np.float32)
    completions = Completions(mask, advantages, logs[0], logs[0], logs[1], np.zeros((1, ROWS), bool))  # pyright: ignore
    texts = Texts(tokens, lengths, experts)  # pyright: ignore
    texts, completions = jax.tree.map(layout.feed.put, (texts, completions))
    skeleton, state = starting_state(CONFIG, layout, lambda devices: small_model(CONFIG.model, 0))
    policy = policy_state(state, reference=True)
    log_probs = np.asarray(make_log_probs(skeleton, CONFIG, layout)(policy.params, policy.router_biases, texts))
    policy = dataclasses.replace(policy, reference=jax.tree.map(jnp.copy, policy.params))
    step = make_policy_step(skeleton, CONFIG, GRPOConfig(kl_weight=0.1), longest=8, layout=layout)
    return *step(policy, texts, completions, jnp.float32(1e-3)), log_probs * mask


def main() -> None:
    one, one_metrics, one_logs = update_on(StateLayout())
    two, two_metrics, two_logs = update_on(StateLayout.of(MeshConfig(fsdp=2, context=2, expert=2)))

    def apart(left: object, right: object) -> float:
        pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
        sizes = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
        return max(float(np.abs(a - b).max() / (np.abs(a).max() or 1)) for a, b in sizes if a.size)

    moments = [jax.tree.leaves(state.optimizer)[1:] for state in (one, two)]
    result = {
        "log_probs": apart(one_logs, two_logs),
        "terms": apart(one_metrics.terms, two_metrics.terms),
        "entropy": apart(one_metrics.entropy, two_metrics.entropy),
        "moments": apart(*moments),
        "norm": float(one_metrics.gradient_norm),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
