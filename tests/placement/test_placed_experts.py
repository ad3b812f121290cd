"""Checks that a model with redundant experts gives the outputs of the model it was made from."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from small_models import small_model

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import ConfigError
from dsv3_jax.sharding.placed_experts import with_placed_experts
from dsv3_jax.sharding.placement import place_experts

CONFIG = ModelConfig.preset("nano", num_hidden_layers=3, num_nextn_predict_layers=1)


@pytest.mark.slow
def test_outputs_are_the_models():
    model = small_model(CONFIG, seed=0)
    random = np.random.default_rng(1)
    layers, experts = CONFIG.num_moe_layers + 1, CONFIG.n_routed_experts
    placement = place_experts(random.integers(0, 99, (layers, experts)), physical=2 * experts, devices=4)
    assert (placement.counts > 1).any()
    placed = with_placed_experts(model, placement)
    tokens = jnp.asarray(random.integers(0, CONFIG.vocab_size, (2, 6)), jnp.int32)
    one, other = model(tokens), placed(tokens)
    np.testing.assert_allclose(other.logits, one.logits, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(other.mtp_logits[0], one.mtp_logits[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(other.routing.load, one.routing.load)
    positions = jnp.zeros((2, 1), jnp.int32)
    hidden = [each.decode(tokens[:, :1], each.init_cache(2, 4), positions).hidden for each in (model, placed)]
    np.testing.assert_allclose(hidden[1], hidden[0], rtol=1e-5, atol=1e-6)


def test_a_placement_of_another_model_is_refused():
    placement = place_experts(np.ones((1, 4)), physical=4, devices=2)
    with pytest.raises(ConfigError, match="the model has"):
        with_placed_experts(small_model(CONFIG, seed=0), placement)
