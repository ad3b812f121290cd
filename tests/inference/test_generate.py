"""Checks generation against the golden text, the full forward pass, and each prompt by itself."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_data import build_model, load_golden
from small_models import small_model

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import UserError
from dsv3_jax.inference import GREEDY, Engine, EngineConfig, Sampler, complete, generate, stream
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.precision import Precision

GOLDEN = ("v3_yarn_small", "lite_small")  # all are decoded token by token in tests/model/test_golden.py
PROMPTS = [[5, 9, 200], [17, 3, 3, 88, 41, 250, 7, 7, 12], list(range(30, 55))]
NEW = 12
DRAWN = Sampler(temperature=1.3, top_k=20, top_p=0.9)
SAMPLERS = {"argvalues": [GREEDY, DRAWN], "ids": ["greedy", "drawn"]}


@pytest.fixture(scope="module")
def model() -> DeepSeekV3:
    # The weights are so large that the likeliest token leads by far more than rounding.
    config = ModelConfig.preset("tiny", vocab_size=256, initializer_range=0.2)
    return small_model(config, 0)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_greedy_text(name: str) -> None:
    golden = load_golden(name)
    text = golden.io["greedy"]
    prompt = text[:, :16]
    written = generate(build_model(golden), jnp.asarray(prompt, jnp.int32), text.shape[1] - 16, GREEDY)
    np.testing.assert_array_equal(written, text)


@pytest.mark.parametrize("name", GOLDEN[:1])
def test_cached_decoding_equals_the_full_forward_pass(name: str) -> None:
    """Prefill, then decoding several tokens and one at a time, gives the expanded form's logits at every position."""
    golden = load_golden(name)
    model = build_model(golden)
    ids = jnp.asarray(golden.io["ids"][:2], jnp.int32)
    read = nnx.jit(lambda model, ids: model.prefill(ids, model.init_cache(2, 64)))(model, ids[:, :22])
    logits = [model.head(read.hidden)]
    decode = nnx.jit(lambda model, *arguments: model.decode(*arguments))
    for start, stop in [(22, 34), (34, 46), (46, 47), (47, 48)]:
        positions = jnp.broadcast_to(jnp.arange(start, stop), (2, stop - start))
        read = decode(model, ids[:, start:stop], read.cache, positions)
        logits.append(model.head(read.hidden))
    want = golden.io["logits"][:2]
    # The two forms add up a few dozen float32 terms in different orders.
    np.testing.assert_allclose(np.concatenate(logits, axis=1), want, rtol=0, atol=1e-4 * want.std())


@pytest.mark.parametrize("sampler", **SAMPLERS)
def test_a_batch_writes_what_each_prompt_gets_alone(model: DeepSeekV3, sampler: Sampler) -> None:
    key = jax.random.key(7)
    together = complete(model, PROMPTS, NEW, sampler, key)
    alone = [complete(model, [prompt], NEW, sampler, key)[0] for prompt in PROMPTS]
    assert together == alone
    assert len({tuple(text) for text in together}) == len(PROMPTS)


@pytest.mark.parametrize("precision", ["bfloat16", pytest.param("fp8", marks=pytest.mark.slow)])
def test_other_rows_change_nothing_in_any_precision(precision: str) -> None:
    """Every prompt but the first is replaced by one of its length, so that the compiled program stays the same."""
    config = ModelConfig.preset("tiny", vocab_size=256, num_hidden_layers=2, initializer_range=0.2)
    model = small_model(config, 0, precision=Precision.preset(precision))
    others = [[(7 * token + 3) % 256 for token in prompt] for prompt in PROMPTS]
    key = jax.random.key(5)
    first = complete(model, PROMPTS, NEW, DRAWN, key)
    second = complete(model, [PROMPTS[0], *others[1:]], NEW, DRAWN, key)
    assert first[0] == second[0]
    assert first[1:] != second[1:]


def test_greedy_tokens_are_the_likeliest_of_the_full_forward_pass(model: DeepSeekV3) -> None:
    prompt = jnp.asarray([PROMPTS[2]])
    written = generate(model, prompt, NEW, GREEDY)
    assert written.shape == (1, prompt.shape[1] + NEW)
    assert written.dtype == jnp.int32
    likeliest = nnx.jit(lambda model, ids: model(ids).logits)(model, written).argmax(-1)
    np.testing.assert_array_equal(written[:, prompt.shape[1] :], likeliest[:, prompt.shape[1] - 1 : -1])


def test_generated_tokens_follow_each_rows_own_prompt(model: DeepSeekV3) -> None:
    lengths = [len(prompt) for prompt in PROMPTS]
    width = max(lengths)
    padded = np.full((3, width), 99)
    for row, prompt in zip(padded, PROMPTS, strict=True):
        row[: len(prompt)] = prompt
    written = np.asarray(generate(model, padded, NEW, prompt_lengths=lengths))
    assert written.shape == (3, width + NEW)
    for row, prompt, new in zip(written, PROMPTS, complete(model, PROMPTS, NEW), strict=True):
        filled = prompt + new
        assert row.tolist() == filled + [0] * (width + NEW - len(filled))


@pytest.mark.parametrize("sampler", **SAMPLERS)
def test_streaming_yields_the_same_tokens(model: DeepSeekV3, sampler: Sampler) -> None:
    key = jax.random.key(1)
    steps = list(stream(model, PROMPTS, NEW, sampler, key))
    assert np.stack(steps, axis=1).tolist() == complete(model, PROMPTS, NEW, sampler, key)


def test_one_key_per_row(model: DeepSeekV3) -> None:
    """With one key equal prompts get equal texts; an array of keys gives each row its own randomness."""
    prompts = [PROMPTS[0]] * 3
    same = complete(model, prompts, NEW, DRAWN, jax.random.key(3))
    assert same[0] == same[1] == same[2]
    keys = jax.random.split(jax.random.key(3), 3)
    own = complete(model, prompts, NEW, DRAWN, keys)
    assert len({tuple(text) for text in own}) == 3
    assert own == complete(model, prompts, NEW, DRAWN, keys)


def test_every_step_draws_with_noise_of_its_own(model: DeepSeekV3) -> None:
    """With equal logits a token depends on the noise alone: twelve equal draws would mean one noise for all steps."""
    even = nnx.clone(model)
    even.head.weight[...] = jnp.zeros_like(even.head.weight[...])
    keys = jax.random.split(jax.random.key(2), 2)
    for text in complete(even, PROMPTS[:2], NEW, Sampler(), keys):
        assert len(set(text)) > NEW / 2


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_cache_has_the_models_dtype(precision: str) -> None:
    model = small_model(ModelConfig.preset("tiny", num_hidden_layers=2), 0, precision=Precision.preset(precision))
    pages = Engine(model, EngineConfig(max_sequences=1))._pages
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(pages)} == {precision}


def test_a_row_ends_at_its_stop_token(model: DeepSeekV3) -> None:
    free = complete(model, PROMPTS, NEW)
    stop = free[1][4]
    want = [text[: text.index(stop)] if stop in text else text for text in free]
    assert complete(model, PROMPTS, NEW, stop_token=stop) == want
    lengths = [len(prompt) for prompt in PROMPTS]
    padded = np.zeros((3, max(lengths)), np.int32)
    for row, prompt in zip(padded, PROMPTS, strict=True):
        row[: len(prompt)] = prompt
    row = np.asarray(generate(model, padded, NEW, prompt_lengths=lengths, stop_token=stop))[1]
    assert row[lengths[1] :].tolist() == want[1] + [stop] * (len(row) - lengths[1] - len(want[1]))


def test_a_row_ends_at_the_first_of_several_stop_tokens(model: DeepSeekV3) -> None:
    free = complete(model, PROMPTS, NEW)
    stops = [free[1][4], free[0][2], 10**6]
    want = [text[: min((text.index(stop) for stop in stops if stop in text), default=NEW)] for text in free]
    assert complete(model, PROMPTS, NEW, stop_token=stops) == want
    row = np.asarray(generate(model, np.array(PROMPTS[:1]), NEW, stop_token=stops))[0, len(PROMPTS[0]) :]
    last = free[0][len(want[0])]  # the token that ended the row stays; the rest is the first of them
    assert row.tolist() == want[0] + [last] + [stops[0]] * (NEW - len(want[0]) - 1)


def test_a_temperature_is_a_sampler(model: DeepSeekV3) -> None:
    tokens, key = np.array(PROMPTS[:1]), jax.random.key(5)
    drawn = generate(model, tokens, NEW, Sampler(temperature=1.3), key)
    np.testing.assert_array_equal(generate(model, tokens, NEW, temperature=1.3, key=key), drawn)
    with pytest.raises(UserError, match="not both"):
        generate(model, tokens, NEW, GREEDY, temperature=1.0)


def test_the_default_draws_with_a_fixed_key(model: DeepSeekV3) -> None:
    drawn = complete(model, PROMPTS, NEW, Sampler(temperature=0.8, top_p=0.95), jax.random.key(0))
    assert complete(model, PROMPTS, NEW) == drawn
    assert complete(model, PROMPTS, NEW, GREEDY) != drawn


def test_streaming_ends_when_all_rows_have_stopped(model: DeepSeekV3) -> None:
    text = complete(model, PROMPTS[:1], NEW)[0]
    steps = list(stream(model, PROMPTS[:1], NEW, stop_token=text[3]))
    assert len(steps) == text.index(text[3]) + 1


def test_the_whole_context_can_be_filled(model: DeepSeekV3) -> None:
    context = model.config.max_position_embeddings
    assert generate(model, np.arange(context - 2)[None], 2).shape == (1, context)


@pytest.mark.parametrize(
    ("prompts", "new", "message"),
    [
        ([list(range(129))], 1, "prompt 0 has 129 tokens but the model's context is 128"),
        ([[1], [2] * 120], 9, "prompt 1's 120 tokens and 9 new ones .* at most 8"),
        ([[1], []], 1, "prompt 1 is empty"),
        ([], 1, "no prompt"),
        ([[1, 256]], 1, "token 256, outside"),
        ([[-1]], 1, "token -1, outside"),
        ([[1]], 0, "max_new_tokens"),
    ],
)
@pytest.mark.parametrize("call", [complete, stream])
def test_bad_requests_are_refused_before_anything_runs(model: DeepSeekV3, call, prompts, new, message) -> None:
    with pytest.raises(UserError, match=message):
        call(model, prompts, new)


def test_bad_arrays_and_keys_are_refused(model: DeepSeekV3) -> None:
    with pytest.raises(UserError, match="tokens must be whole numbers"):
        generate(model, jnp.zeros((4,), jnp.int32), 1)
    with pytest.raises(UserError, match="prompt_lengths"):
        generate(model, jnp.zeros((2, 4), jnp.int32), 1, prompt_lengths=[4, 5])
    with pytest.raises(UserError, match="2 such keys"):
        complete(model, [[1], [2]], 1, Sampler(), jax.random.split(jax.random.key(0), 3))
