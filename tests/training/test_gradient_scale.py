"""Checks that gradients do not depend on the size of the numbers in which they are computed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import small_model

from dsv3_jax.config import ModelConfig
from dsv3_jax.precision import Precision
from dsv3_jax.training.losses import BatchTargets, LossWeights, objective

pytestmark = pytest.mark.slow

ROWS, LENGTH = 2, 16


def test_gradients_times_tokens_do_not_depend_on_the_tokens() -> None:
    """Computes a whole model's gradients in FP8 for batches of 2^8 to 2^26 tokens, which are equal bit for bit.

    The report's batches have 15 * 2^22 tokens, almost as many as the last.
    """
    config = ModelConfig.preset("tiny", vocab_size=64, num_hidden_layers=2, initializer_range=0.1)
    model = small_model(config, 0, precision=Precision.preset("fp8"))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 64, (ROWS, LENGTH + 1)), jnp.int32)

    @jax.jit
    @jax.grad
    def gradients(params: nnx.State, batch_tokens: jax.Array) -> jax.Array:
        return objective(
            nnx.merge(graph, params, jax.tree.map(lambda leaf: leaf, rest)),
            tokens,
            jnp.ones_like(tokens),
            weights=LossWeights(balance=jnp.float32(1e-4), mtp=jnp.float32(0.3)),
            targets=BatchTargets(batch_tokens, jnp.full(2, batch_tokens)),
            balance="sequence",
            isolate_segments=False,
            chunk=4096,
        ).total

    found = {e: jax.tree.leaves(jax.device_get(gradients(params, jnp.float32(2.0**e)))) for e in (8, 17, 26)}
    for fewest, *others in zip(*found.values(), strict=True):
        assert np.any(fewest)
        for exponent, other in zip((17, 26), others, strict=True):
            np.testing.assert_array_equal(other * 2.0 ** (exponent - 8), fewest)
