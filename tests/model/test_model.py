"""Checks the model: both forms of attention, causality, segments, MTP chains, statistics, rematerialisation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import small_model

from dsv3_jax.config import ModelConfig, RopeScaling
from dsv3_jax.errors import ConfigError, UserError
from dsv3_jax.model import DeepSeekV3, router_biases, set_router_biases
from dsv3_jax.modules.attention_core import causal_attention
from dsv3_jax.modules.rematerialisation import REMATERIALISATIONS
from dsv3_jax.modules.router import RouterBias
from dsv3_jax.precision import Precision

YARN = RopeScaling(factor=4.0, original_max_position_embeddings=16)
VARIANTS = {
    "v3": {},
    "without-query-compression": {"q_lora_rank": None},
    "yarn-two-mtp": {"rope_scaling": YARN, "num_nextn_predict_layers": 2},
    "all-moe-no-shared": {"first_k_dense_replace": 0, "n_shared_experts": 0, "num_nextn_predict_layers": 0},
    "all-dense": {"first_k_dense_replace": 3, "num_nextn_predict_layers": 0},
    "softmax-greedy": {"scoring_func": "softmax", "topk_method": "greedy", "n_group": 1, "topk_group": 1},
}
BATCH, LENGTH = 2, 24


# Compiled as whole programs: operation by operation the same tests take several times as long.
def hidden_and_cache(method):
    def call(*arguments, **options):
        read = method(*arguments, **options)
        return read.hidden, read.cache

    return call


prefill = nnx.jit(hidden_and_cache(DeepSeekV3.prefill))
decode = nnx.jit(hidden_and_cache(DeepSeekV3.decode))
draft = nnx.jit(hidden_and_cache(DeepSeekV3.draft), static_argnames="depth")
forward = nnx.jit(lambda model, tokens, **given: model(tokens, **given))
features = nnx.jit(
    lambda model, tokens, isolate_segments=True, **given: model.features(
        tokens, isolate_segments=isolate_segments, **given
    ),
    static_argnames="isolate_segments",
)


def make(**changes):
    model = small_model(ModelConfig.preset("tiny", **changes), 3)
    if model.config.has_router_bias and (model.config.num_moe_layers or model.mtp):
        biases = router_biases(model)
        set_router_biases(model, 0.1 * jax.random.normal(jax.random.key(0), biases.shape))
    return model


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (BATCH, LENGTH), 0, 320)


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.mark.parametrize(
    "variant",
    [
        "v3",
        "without-query-compression",
        pytest.param("yarn-two-mtp", marks=pytest.mark.slow),
        pytest.param("all-moe-no-shared", marks=pytest.mark.slow),
        "all-dense",
        "softmax-greedy",
    ],
)
def test_absorbed_decoding_agrees_with_the_expanded_pass(variant, tokens):
    """Prefills a part, then decodes several tokens at once, then one by one, each row at its own positions."""
    model = make(**VARIANTS[variant])
    expected = features(model, tokens).hidden
    cache = model.init_cache(BATCH, LENGTH)
    hidden, cache = prefill(model, tokens[:, :9], cache)
    np.testing.assert_allclose(hidden, expected[:, :9], atol=2e-5)
    positions = jnp.broadcast_to(jnp.arange(9, 14), (BATCH, 5))
    hidden, cache = decode(model, tokens[:, 9:14], cache, positions)
    np.testing.assert_allclose(hidden, expected[:, 9:14], atol=2e-5)
    # The second row goes one token back: its entry is written again, and entries after it are not seen.
    positions = jnp.array([[14], [13]])
    hidden, cache = decode(model, tokens[jnp.arange(BATCH)[:, None], positions], cache, positions)
    np.testing.assert_allclose(hidden, expected[jnp.arange(BATCH)[:, None], positions], atol=2e-5)


def test_mtp_drafts_agree_with_the_training_chain(tokens):
    model = make(**VARIANTS["yarn-two-mtp"])
    chain = features(model, tokens)
    cache = model.init_cache(BATCH, LENGTH, mtp=True)
    previous = chain.hidden
    for depth, expected in enumerate(chain.mtp_hidden, start=1):
        count = LENGTH - depth
        positions = jnp.broadcast_to(jnp.arange(depth, LENGTH), (BATCH, count))
        hidden, cache = draft(model, previous[:, :count], tokens[:, depth:], cache, positions, depth=depth)
        np.testing.assert_allclose(hidden, expected, atol=2e-5)
        previous = hidden


def test_mtp_logits_have_their_shapes_and_see_one_more_token_each(tokens):
    model = make(num_nextn_predict_layers=2)
    out = forward(model, tokens)
    assert [logits.shape[1] for logits in out.mtp_logits] == [LENGTH - 1, LENGTH - 2]
    changed = forward(model, tokens.at[:, 10].add(1))
    for depth, logits in enumerate((out.logits, *out.mtp_logits)):
        same = np.isclose(logits, (changed.logits, *changed.mtp_logits)[depth], atol=1e-6).all(axis=(0, 2))
        assert same[: 10 - depth].all()
        assert not same[10 - depth]


def test_output_types(model, tokens):
    out = forward(model, tokens)
    assert out.logits.dtype == jnp.float32
    assert out.routing.load.shape == (3, 8)
    assert out.routing.load.dtype == jnp.int32
    half = small_model(model.config, 3, precision=Precision.preset("bfloat16"), param_dtype=jnp.bfloat16)
    assert forward(half, tokens).logits.dtype == jnp.float32
    assert half.moe_blocks.feed_forward.router.bias.dtype == jnp.float32
    assert half.moe_blocks.feed_forward.router.weight.dtype == jnp.bfloat16


def test_bfloat16_stays_near_float32(model, tokens):
    half = small_model(model.config, 3, precision=Precision.preset("bfloat16"))
    full = small_model(model.config, 3)
    difference = np.asarray(forward(half, tokens).logits - forward(full, tokens).logits)
    assert np.std(difference) < 0.05 * np.std(np.asarray(forward(full, tokens).logits))


def test_segments_are_as_if_alone(model, tokens):
    """With isolation, a document in a packed row gives what it gives by itself at the same positions."""
    segment_ids = jnp.where(jnp.arange(LENGTH) < 10, 1, 2) * jnp.ones((BATCH, 1), jnp.int32)
    positions = jnp.broadcast_to(jnp.concatenate([jnp.arange(10), jnp.arange(LENGTH - 10)]), (BATCH, LENGTH))
    packed = features(model, tokens, positions=positions, segment_ids=segment_ids).hidden
    np.testing.assert_allclose(packed[:, 10:], features(model, tokens[:, 10:]).hidden, atol=2e-5)
    open_border = features(model, tokens, segment_ids=segment_ids, isolate_segments=False).hidden
    np.testing.assert_allclose(open_border, features(model, tokens).hidden, atol=2e-5)


def test_padding_is_not_counted(model, tokens):
    """The loads and balance of a row padded at its end are those of the row without padding."""
    config = model.config
    segment_ids = (jnp.arange(LENGTH) < 16).astype(jnp.int32) * jnp.ones((BATCH, 1), jnp.int32)
    padded = forward(model, tokens, segment_ids=segment_ids).routing
    alone = forward(model, tokens[:, :16]).routing
    main = config.num_moe_layers
    np.testing.assert_array_equal(padded.load[:main], alone.load[:main])
    np.testing.assert_allclose(padded.sequence_balance[:main], alone.sequence_balance[:main], rtol=1e-5)
    np.testing.assert_allclose(padded.batch_balance[:main], alone.batch_balance[:main], rtol=1e-5)
    assert int(alone.load[0].sum()) == BATCH * 16 * config.num_experts_per_tok
    assert int(alone.load[main].sum()) == BATCH * 15 * config.num_experts_per_tok


@pytest.fixture(scope="module")
def gradient(model, tokens):
    """Returns a function from a rematerialisation policy to the gradient of one model."""
    _, params, rest = nnx.split(model, nnx.Param, ...)

    @functools.cache
    def gradient(remat):
        other = nnx.eval_shape(lambda: DeepSeekV3(model.config, rngs=nnx.Rngs(3), remat=remat))
        graph = nnx.graphdef(other)
        loss = lambda params: jnp.mean(nnx.merge(graph, params, rest)(tokens).logits ** 2)  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    return gradient


@pytest.mark.slow
@pytest.mark.parametrize("policy", [name for name in REMATERIALISATIONS if name != "none"])
def test_rematerialisation_changes_no_gradient(gradient, policy):
    for plain, recomputed in zip(jax.tree.leaves(gradient("none")), jax.tree.leaves(gradient(policy)), strict=True):
        np.testing.assert_allclose(plain, recomputed, atol=1e-7, rtol=1e-4)


@pytest.mark.slow
def test_unrolled_layers_equal_the_loop(model, gradient, tokens, monkeypatch):
    """Other tests compile the loop (`conftest.py`); outside of tests small models train with unrolled layers."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
        return jnp.mean(nnx.merge(graph, params, rest)(tokens).logits ** 2)

    looped = str(jax.make_jaxpr(loss)(params))
    monkeypatch.setattr("dsv3_jax.model.MOST_UNROLLED_LAYERS", 8)
    assert "unroll=2" in str(jax.make_jaxpr(lambda params: loss(params))(params))
    assert "unroll=2" not in looped
    for ours, theirs in zip(
        jax.tree.leaves(jax.jit(jax.grad(loss))(params)), jax.tree.leaves(gradient("none")), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-7, rtol=1e-4)


def test_unknown_rematerialisation_is_named():
    with pytest.raises(ConfigError, match="'reports' does not exist; choose report"):
        DeepSeekV3(ModelConfig.preset("tiny"), rngs=nnx.Rngs(0), remat="reports")


def test_report_policy_keeps_less_than_everything(tokens):
    """The named values really are recomputed: fewer bytes are saved for the backward pass."""

    def saved(remat):
        model = nnx.eval_shape(lambda: DeepSeekV3(ModelConfig.preset("tiny"), rngs=nnx.Rngs(3), remat=remat))
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        def backward(params, rest):
            return jax.vjp(lambda params: nnx.merge(graph, params, rest)(tokens).logits.sum(), params)[1]

        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(backward, params, rest)))

    assert saved("full") < saved("report") < saved("none")


def test_router_bias_is_no_parameter(model):
    _graph, params, biases, rest = nnx.split(model, nnx.Param, RouterBias, ...)
    assert len(jax.tree.leaves(biases)) == 2
    assert not jax.tree.leaves(rest)
    assert not any("bias" in jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params))


def test_router_biases_round_trip(model):
    wanted = jnp.arange(24, dtype=jnp.float32).reshape(3, 8)
    copy = nnx.clone(model)
    set_router_biases(copy, wanted)
    np.testing.assert_array_equal(router_biases(copy), wanted)
    np.testing.assert_array_equal(copy.mtp[0].block.feed_forward.router.bias[...], wanted[2])


def test_the_program_does_not_grow_with_depth():
    """61 layers trace to as many equations as 5, since layers are scanned."""

    def equations(layers):
        config = ModelConfig.preset("tiny", num_hidden_layers=layers)
        model = nnx.eval_shape(lambda: DeepSeekV3(config, rngs=nnx.Rngs(0)))
        graph, state = nnx.split(model)
        tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
        return len(str(jax.make_jaxpr(lambda s, t: nnx.merge(graph, s)(t).logits)(state, tokens)).splitlines())

    assert equations(61) == equations(5)


@pytest.mark.parametrize("chunk", [None, 5, 16, 64])
@pytest.mark.parametrize("segmented", [False, True])
def test_attention_core_against_float64(chunk, segmented):
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 2, 33, 3, 8))
    v = rng.normal(size=(2, 33, 3, 5))
    segments = np.sort(rng.integers(1, 4, size=(2, 33)), axis=1) if segmented else None
    visible = np.tril(np.ones((33, 33), bool))[None]
    if segmented:
        visible = visible & (segments[:, :, None] == segments[:, None, :])
    logits = np.where(visible[:, None], 0.3 * np.einsum("bqhc,bshc->bhqs", q, k), -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    expected = np.einsum("bhqs,bshv->bqhv", weights / weights.sum(-1, keepdims=True), v)
    arrays = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
    ids = None if segments is None else jnp.asarray(segments)
    attend = jax.jit(functools.partial(causal_attention, scale=0.3, query_chunk=chunk))
    ours = attend(*arrays, segment_ids=ids)
    np.testing.assert_allclose(ours, expected, atol=2e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([[1, 320]], "token 320 is outside the model's vocabulary of 320"),
        ([[-1, 3]], "token -1 is outside"),
        ([1, 2, 3], r"shape \[batch, length\], not int32\(3,\)"),
        ([[0.5]], "must be whole numbers"),
        (np.zeros((1, 129), int), "129 tokens are more than the model's context of 128"),
    ],
)
def test_input_that_makes_no_sense_is_one_line(model, given, message):
    with pytest.raises(UserError, match=message):
        model(given)


def test_lists_are_taken_and_a_model_is_shown_as_one_line(model):
    checked = model._checked([[1, 2, 319]], None)
    assert (checked.shape, checked.dtype) == ((1, 3), jnp.int32)
    assert f"{model.config.num_parameters(mtp=True):,} parameters" in repr(model)
    assert "\n" not in repr(model)


def test_loads_of_mtp_count_pairs_of_real_tokens():
    """Depth k pairs a token with its k-th successor: a row of n real tokens has n - k such pairs, or none."""
    config = ModelConfig.preset("tiny", vocab_size=64, num_hidden_layers=1, num_nextn_predict_layers=2)
    config = config.replace(first_k_dense_replace=0)
    lengths = [8, 5, 2, 1]
    segments = jnp.asarray([[1] * n + [0] * (8 - n) for n in lengths])
    graph, state = nnx.split(small_model(config, 0))
    loads = jax.jit(lambda state, ids: nnx.merge(graph, state).features(ids, segment_ids=ids).routing.load)(
        state, segments
    )
    pairs = [sum(max(n - k, 0) for n in lengths) for k in range(3)]
    np.testing.assert_array_equal(np.sum(loads, axis=1), np.multiply(config.num_experts_per_tok, pairs))
