"""Checks that a wrong configuration gives an error of one sentence that names the field."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.config import ModelConfig, RopeScaling
from dsv3_jax.errors import ConfigError
from dsv3_jax.model_presets import presets


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"n_routed_experts": 9}, "n_routed_experts"),
        ({"n_group": 3}, "n_group"),
        ({"topk_group": 5}, "topk_group"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok"),
        ({"n_routed_experts": 4, "n_group": 4, "num_experts_per_tok": 1}, "n_group"),
        ({"qk_rope_head_dim": 3}, "qk_rope_head_dim"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"hidden_size": 2**60}, "hidden_size"),
        ({"n_routed_experts": 2**60}, "n_routed_experts"),
        ({"hidden_size": 32.0}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"vocab_size": "256"}, "vocab_size"),
        ({"q_lora_rank": 0}, "q_lora_rank"),
        ({"first_k_dense_replace": 4}, "first_k_dense_replace"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"scoring_func": "tanh"}, "scoring_func"),
        ({"topk_method": "best"}, "topk_method"),
        ({"topk_method": "greedy"}, "topk_method"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"routed_scaling_factor": float("inf")}, "routed_scaling_factor"),
        ({"experts": 3}, "experts"),
    ],
)
def test_wrong_field_is_named(change, named):
    with pytest.raises(ConfigError) as caught:
        ModelConfig.preset("tiny", **change)
    message = str(caught.value)
    assert named in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"factor": 0.5}, "factor"),
        ({"original_max_position_embeddings": 0}, "original_max_position_embeddings"),
        ({"beta_fast": 1.0, "beta_slow": 2.0}, "beta_fast"),
        ({"mscale": -1.0}, "mscale"),
    ],
)
def test_wrong_rope_scaling_is_named(change, named):
    with pytest.raises(ConfigError, match=named):
        RopeScaling(**({"factor": 4.0, "original_max_position_embeddings": 64} | change))


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean nano"):
        ModelConfig.preset("nanno")


@pytest.mark.parametrize("name", presets())
def test_presets_survive_json(name):
    config = ModelConfig.preset(name)
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_from_dict_names_missing_and_unknown_fields():
    values = ModelConfig.preset("tiny").to_dict()
    with pytest.raises(ConfigError, match=r"'hidden_siz'.*hidden_size"):
        ModelConfig.from_dict(values | {"hidden_siz": 3})
    del values["kv_lora_rank"]
    with pytest.raises(ConfigError, match="kv_lora_rank"):
        ModelConfig.from_dict(values)


@settings(max_examples=200, deadline=None)
@given(experts=st.integers(1, 32), groups=st.integers(1, 8), kept=st.integers(1, 8), chosen=st.integers(1, 32))
def test_routing_is_accepted_exactly_when_a_token_can_be_routed(experts, groups, kept, chosen):
    possible = experts % groups == 0 and kept <= groups and chosen <= kept * (experts // groups)
    possible = possible and (groups == 1 or experts // groups >= 2)
    change = {"n_routed_experts": experts, "n_group": groups, "topk_group": kept, "num_experts_per_tok": chosen}
    try:
        ModelConfig.preset("tiny", **change)
    except ConfigError:
        assert not possible
    else:
        assert possible
