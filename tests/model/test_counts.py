"""Checks counts from the configuration against published figures and against what is allocated."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dsv3_jax.config import ModelConfig
from dsv3_jax.counts import count_flops, count_parameters
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.model_presets import presets
from dsv3_jax.modules import attention_core


def test_v3_has_the_published_counts():
    config = ModelConfig.preset("v3-671b")
    counts = count_parameters(config)
    assert config.num_parameters() == 671_026_419_200
    assert config.num_active_parameters() == 35_698_932_224 + 2 * 926_679_040 + 7_168
    assert counts.mtp_total == 11_610_068_224
    assert config.num_parameters(mtp=True) == 671_026_419_200 + 11_610_068_224
    assert counts.block.attention == 187_107_328
    assert counts.moe_layer == 11_507_286_272
    assert counts.block.routed_expert == 44_040_192
    assert counts.block.dense_feed_forward == 396_361_728


@pytest.mark.parametrize(
    ("name", "total", "active", "digits"),
    [
        ("kimi-k2-1t", 1026.41e9, 32.86e9, 2),
        ("ablation-16b", 15.7e9, 2.66e9, 1),
        ("ablation-229b", 228.7e9, 21.65e9, 1),
        ("moonlight-16b", 15.96e9, 2.91e9, 2),
    ],
)
def test_other_published_counts(name, total, active, digits):
    config = ModelConfig.preset(name)
    assert round(config.num_parameters() / 1e9, digits) == round(total / 1e9, digits)
    assert config.num_active_parameters() == pytest.approx(active, rel=2e-3)


def test_v3_flops_per_token():
    flops = count_flops(ModelConfig.preset("v3-671b"), 4096)
    core = flops.terms["attention_core"]
    assert (flops.forward - core) / 1e9 == pytest.approx(73.25, abs=0.01)
    assert core / 1e9 == pytest.approx(10.23, abs=0.01)
    assert flops.training / 1e9 == pytest.approx(250.45, abs=0.01)
    full = count_flops(ModelConfig.preset("v3-671b"), 4096, causal=False)
    assert full.training / 1e9 == pytest.approx(281.2, abs=0.1)


@pytest.mark.parametrize("name", presets())
def test_counts_equal_what_is_allocated(name):
    """The counts are those of the abstract model, which has every array of the real one."""
    config = ModelConfig.preset(name)
    model = nnx.eval_shape(lambda: DeepSeekV3(config, rngs=nnx.Rngs(0)))
    allocated = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    assert allocated == config.num_parameters(mtp=True)


def test_forward_products_of_the_traced_model_are_the_counted_ones(monkeypatch):
    """Sums 2mkn over the products that a model with one expert and no padding of rows really computes."""
    monkeypatch.setattr(attention_core, "CHUNKS", 1)  # the whole square of logits, which is counted here
    config = ModelConfig.preset(
        "tiny",
        n_routed_experts=2,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        num_nextn_predict_layers=0,
        num_hidden_layers=2,
    )
    length = 64
    counted = count_flops(config, length, causal=False)
    without_experts = sum(value for term, value in counted.terms.items() if term != "routed_experts")
    model = DeepSeekV3(config, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    jaxpr = jax.make_jaxpr(lambda s, t: nnx.merge(graph, s)(t).logits)(state, jnp.zeros((1, length), jnp.int32))
    assert _product_flops(jaxpr.jaxpr, outside="routed_experts") / length == pytest.approx(without_experts)


def _product_flops(jaxpr, outside):
    total = 0.0
    for equation in jaxpr.eqns:
        if outside in str(equation.source_info.name_stack):
            continue
        if equation.primitive.name == "dot_general":
            (contract, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2.0 * equation.outvars[0].aval.size * jnp.prod(jnp.asarray([shape[i] for i in contract]))
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += times * _product_flops(inner, outside)
    return float(total)
