"""Checks the engine against the plain expanded model, and each request against itself alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import small_model

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import ConfigError, UserError
from dsv3_jax.inference import Engine, EngineConfig, Request, Result, Sampler
from dsv3_jax.model import DeepSeekV3

VOCABULARY, CONTEXT = 12, 64
SHAPES = {"context": CONTEXT, "page_size": 4, "chunk_sizes": (8,), "steps": 3, "top_logprobs": 3}
SAMPLER = Sampler(temperature=1.2, top_p=0.9, repetition_penalty=1.2, presence_penalty=0.3)


@pytest.fixture(scope="module")
def model() -> DeepSeekV3:
    """Returns a model with so few tokens that its untrained MTP module is often right and often wrong."""
    config = ModelConfig.preset("tiny", vocab_size=VOCABULARY, initializer_range=0.25)
    return small_model(config, 3)


def prompts() -> list[tuple[int, ...]]:
    random = np.random.default_rng(0)
    return [tuple(random.integers(0, VOCABULARY, length).tolist()) for length in (1, 2, 9, 17, 30, 21)]


@pytest.fixture(scope="module")
def plain(model: DeepSeekV3) -> list[list[int]]:
    """Returns the greedy text of each prompt by the expanded model, one whole pass per token."""
    forward = nnx.jit(lambda model, ids: model(ids).logits)
    texts = []
    for prompt in prompts():
        ids = np.zeros((1, CONTEXT), np.int32)
        ids[0, : len(prompt)] = prompt
        for at in range(len(prompt), len(prompt) + 20):
            ids[0, at] = np.asarray(forward(model, jnp.asarray(ids)))[0, at - 1].argmax()
        texts.append(ids[0, len(prompt) : len(prompt) + 20].tolist())
    return texts


@pytest.fixture(scope="module", params=[0, 2], ids=["plain", "two drafts"])
def engine(model: DeepSeekV3, request: pytest.FixtureRequest) -> Engine:
    return Engine(model, EngineConfig(max_sequences=4, drafts=request.param, record_experts=True, **SHAPES))


def requests(**settings) -> list[Request]:
    own = {"max_new_tokens": 20, "top_logprobs": 2} | settings
    return [Request(prompt=prompt, seed=seed, **own) for seed, prompt in enumerate(prompts())]


def compilations() -> list[str]:
    """Returns a list to which every later compilation adds an entry."""
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled.append(name) if "backend_compile" in name else None
    )
    jax.jit(lambda x: x + 17)(1)
    assert len(compiled) == 1
    compiled.clear()
    return compiled


def alone(engine: Engine, wanted: list[Request]) -> list[Result]:
    return [engine.run([request])[0] for request in wanted]


def test_greedy_text_is_that_of_the_expanded_model(engine: Engine, plain) -> None:
    assert [result.tokens for result in engine.run(requests())] == plain
    if engine.drafts:
        first, second = np.divide(engine.statistics.accepted, engine.statistics.drafted)
        assert 0 < first < 1
        assert 0 <= second < 1  # of a random model
        assert engine.statistics.drafted[1] > 0


def test_a_token_is_drafted_if_the_module_had_guessed_it(engine: Engine, plain) -> None:
    """The flags agree with the counts, and greedy drafts that are right are accepted wherever a text ends."""
    before = sum(engine.statistics.accepted), sum(engine.statistics.drafted[:1])
    results = engine.run(requests())
    accepted = sum(sum(result.drafted) for result in results)
    assert sum(engine.statistics.accepted) - before[0] == accepted
    # Each step of a request checks its first draft, and ends with a token that is no draft unless the text ends.
    steps = 20 * len(results) - accepted + sum(result.drafted[-1] for result in results)
    assert sum(engine.statistics.drafted[:1]) - before[1] == (steps if engine.drafts else 0)
    assert all(not result.drafted[0] or engine.drafts for result in results)
    if engine.drafts:
        for result, text in zip(results, plain, strict=True):
            first = result.drafted.index(True)
            cut = Request(prompt=prompts()[plain.index(text)], max_new_tokens=first + 1)
            assert engine.run([cut])[0].drafted == result.drafted[: first + 1]  # the last is an accepted draft


def test_experts_are_those_of_the_expanded_model(engine: Engine, model: DeepSeekV3) -> None:
    """Each token's experts, also those of a prompt whose pages are shared and of requests that were put back."""
    request = requests()[4]
    results = engine.run([request]) + engine.run([request]) + engine.run(requests()[::-1])[1:2]
    ids = jnp.asarray([*request.prompt, *results[0].tokens[:-1]])[None]

    @nnx.jit
    def one_hot(model: DeepSeekV3, ids: jax.Array) -> jax.Array:
        """Returns the load of each token alone: all but one are marked as padding, which is not counted."""
        alone = jnp.eye(ids.shape[1], dtype=jnp.int32)[:, None]
        return jax.lax.map(
            lambda mask: model.features(ids, segment_ids=mask, isolate_segments=False).routing.load, alone
        )

    want = np.asarray(one_hot(model, ids))[:, : model.config.num_moe_layers]
    for result in results:
        assert result.tokens == results[0].tokens
        got = np.zeros_like(want)
        np.put_along_axis(got, np.stack(result.experts), 1, axis=2)
        np.testing.assert_array_equal(got, want)


def test_an_engine_without_tiles_holds_the_arrays_of_the_model(model: DeepSeekV3) -> None:
    engine = Engine(model, EngineConfig(tiled_weights=False, compile_at_start=False, **SHAPES))
    leaves = zip(jax.tree.leaves(engine._weights), jax.tree.leaves(nnx.state(model)), strict=True)
    assert all(a is b for a, b in leaves)


def test_new_weights_replace_the_old_ones_without_compiling(engine: Engine, model: DeepSeekV3, plain) -> None:
    """The text from then on is that of an engine of the new weights, also where a request began with the old ones."""
    other = small_model(model.config, 4)
    wanted = requests()
    compiled = compilations()
    engine.run(wanted)
    engine.update(other)
    assert engine.free_pages == engine._allocator.count
    new = engine.run(wanted)
    assert [result.tokens for result in new] != plain
    number = engine.submit(wanted[3])
    begun = [token for _ in range(4) for output in engine.step() for token in output.tokens]
    assert 0 < len(begun) < 20
    engine.update(model)
    result = Result()
    while engine.has_work:
        for output in engine.step():
            assert output.request_id == number
            result.add(output)
    continued = Request(prompt=(*wanted[3].prompt, *begun), max_new_tokens=20 - len(begun))
    assert result.tokens == engine.run([continued])[0].tokens
    assert [each.tokens for each in engine.run(wanted)] == plain
    assert not compiled
    with pytest.raises(ConfigError, match="make a new engine"):
        engine.update(small_model(model.config.replace(vocab_size=VOCABULARY + 1), 4))


@pytest.mark.parametrize("sampler", [Sampler(temperature=0.0), SAMPLER], ids=["greedy", "drawn"])
def test_a_request_gets_the_same_bits_in_any_company(engine: Engine, sampler: Sampler) -> None:
    """Tokens and log-probabilities are equal alone, together, after others, and when requests are put back."""
    wanted = requests(sampler=sampler)
    first = alone(engine, wanted)
    assert engine.run(wanted) == first
    assert engine.run(wanted[::-1]) == first[::-1]


@pytest.mark.slow
def test_running_out_of_pages_puts_the_youngest_back(model: DeepSeekV3, plain) -> None:
    engine = Engine(model, EngineConfig(max_sequences=4, drafts=2, cache_tokens=64, **SHAPES))
    wanted = requests(sampler=SAMPLER)
    together = engine.run(wanted)
    assert engine.statistics.preemptions > 0
    assert together == alone(engine, wanted)
    assert [result.tokens for result in engine.run(requests())] == plain
    assert engine.free_pages == 16


def test_log_probabilities_are_those_of_the_expanded_model(engine: Engine, model: DeepSeekV3) -> None:
    request = requests()[3]
    result = engine.run([request])[0]
    ids = jnp.asarray([*request.prompt, *result.tokens])[None]
    want = jax.nn.log_softmax(nnx.jit(lambda model, ids: model(ids).logits)(model, ids)[0], axis=-1)
    want = np.asarray(want)[len(request.prompt) - 1 : -1]
    for row, token, got in zip(want, result.tokens, result.logprobs, strict=True):
        np.testing.assert_allclose(got.logprob, row[token], atol=1e-4)
        np.testing.assert_allclose([value for _, value in got.top], np.sort(row)[:-3:-1], atol=1e-4)
        assert got.top[0][0] == row.argmax()


def test_equal_beginnings_share_pages(engine: Engine) -> None:
    long = tuple(np.random.default_rng(5).integers(0, VOCABULARY, 33).tolist())
    first = engine.run([Request(prompt=long, max_new_tokens=8, top_logprobs=2)])
    reused, read = engine.statistics.reused_tokens, engine.statistics.read_tokens
    assert engine.run([Request(prompt=long, max_new_tokens=8, top_logprobs=2)]) == first
    assert engine.statistics.reused_tokens == reused + 32
    assert engine.statistics.read_tokens <= read + 1
    branch = (*long[:20], *long[:13])
    assert engine.run([Request(prompt=branch, top_logprobs=2, max_new_tokens=8)]) == engine.run(
        [Request(prompt=branch, top_logprobs=2, max_new_tokens=8)]
    )
    assert engine.free_pages == engine._allocator.count


def test_stop_tokens_and_stop_strings(model: DeepSeekV3, plain) -> None:
    letters = "abcdefghijkl"
    engine = Engine(
        model,
        EngineConfig(max_sequences=4, drafts=2, **SHAPES),
        to_bytes=lambda tokens: "".join(letters[token] for token in tokens).encode(),
    )
    texts = ["".join(letters[token] for token in tokens) for tokens in plain]
    wanted, expected = [], []
    for start in range(0, 18):  # a stop at any token: inside, at the end and after what a step accepts
        for request, text in zip(requests(stop_strings=(texts[start % 6][start : start + 3],)), texts, strict=True):
            wanted.append(request)
            expected.append((text, text.find(request.stop_strings[0])))
    for result, (text, found) in zip(engine.run(wanted), expected, strict=True):
        assert result.text == (text if found < 0 else text[:found])
        assert result.finished == ("length" if found < 0 else "stop")
        assert len(result.tokens) == (20 if found < 0 else found + 3)
    token = plain[3][6]
    for result, tokens in zip(engine.run(requests(stop_tokens=(token,))), plain, strict=True):
        assert result.tokens == (tokens[: tokens.index(token) + 1] if token in tokens else tokens)
    with pytest.raises(UserError, match="to_bytes"):
        Engine(model, EngineConfig(compile_at_start=False)).submit(Request(prompt=(1,), stop_strings=("a",)))


def test_cancelling_frees_pages_at_once(engine: Engine, plain) -> None:
    numbers = [engine.submit(request) for request in requests()]
    engine.step()
    for number in numbers[1:]:
        engine.cancel(number)
        engine.cancel(number)
    assert engine.waiting == 0
    assert engine.free_pages >= engine._allocator.count - 21
    tokens: list[int] = []
    while engine.has_work:
        tokens += [token for output in engine.step() for token in output.tokens]
    assert plain[0][-len(tokens) :] == tokens or plain[0] == tokens
    assert engine.free_pages == engine._allocator.count


def test_nothing_is_compiled_after_the_start(engine: Engine) -> None:
    random = np.random.default_rng(7)
    wanted = [
        Request(
            prompt=tuple(random.integers(0, VOCABULARY, random.integers(1, 40)).tolist()),
            max_new_tokens=int(random.integers(1, 12)),
            sampler=[Sampler(temperature=0.0), SAMPLER, Sampler(top_k=3)][number % 3],
            seed=number,
            top_logprobs=[None, 2][number % 2],
        )
        for number in range(200)
    ]
    compiled = compilations()
    results = engine.run(wanted)
    assert not compiled
    assert all(len(result.tokens) == request.max_new_tokens for request, result in zip(wanted, results, strict=True))


def test_nothing_is_compiled_later_for_weights_that_are_bound_to_a_device(model: DeepSeekV3) -> None:
    """A checkpoint's weights are; the first program must not be compiled again when the first request comes."""
    graph, state = nnx.split(model)
    bound = nnx.merge(graph, jax.device_put(state, jax.devices()[0]))
    engine = Engine(bound, EngineConfig(max_sequences=1, drafts=0, **SHAPES))
    compiled = compilations()
    engine.run([Request(prompt=(1, 2, 3), max_new_tokens=4)])
    assert not compiled


def test_an_fp8_cache_gives_nearly_the_same_log_probabilities(model: DeepSeekV3) -> None:
    request = Request(prompt=prompts()[4], max_new_tokens=1, top_logprobs=3)
    scores = []
    for dtype in ("float32", "float8_e4m3fn"):
        engine = Engine(model, EngineConfig(max_sequences=1, drafts=0, cache_dtype=dtype, **SHAPES))
        scores.append([value for _, value in engine.run([request])[0].logprobs[0].top])
    error = np.abs(np.subtract(*scores)).max()
    assert 0 < error < 0.1  # a latent's relative error is up to 2^-4, and averages out over the context


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(prompt=(), max_new_tokens=1), "is empty"),
        (Request(prompt=(1,) * 65, max_new_tokens=1), "65 tokens but the model's context is 64"),
        (Request(prompt=(1,) * 60, max_new_tokens=5), "at most 4 new tokens"),
        (Request(prompt=(VOCABULARY,), max_new_tokens=1), "outside the model's vocabulary"),
        (Request(prompt=(1,), max_new_tokens=0), "max_new_tokens"),
        (Request(prompt=(1,), max_new_tokens=1, top_logprobs=9), "top_logprobs"),
    ],
)
def test_bad_requests_are_refused_when_they_are_submitted(engine: Engine, request_: Request, message: str) -> None:
    with pytest.raises(UserError, match=message):
        engine.submit(request_)
    assert not engine.has_work


def test_a_request_larger_than_the_cache_is_refused(model: DeepSeekV3) -> None:
    engine = Engine(model, EngineConfig(cache_tokens=16, compile_at_start=False, **SHAPES))
    with pytest.raises(UserError, match="needs 6 pages of the cache, which has 4"):
        engine.submit(Request(prompt=(1,) * 4, max_new_tokens=20))


@pytest.mark.parametrize(
    "settings",
    [
        {"max_sequences": 0},
        {"chunk_sizes": (8, 4)},
        {"cache_dtype": "int8"},
        {"context": 1000},
        {"drafts": -1},
        {"cache_tokens": 3},
        {"cache_tokens": 64, "cache_memory": 64},
    ],
    ids=str,
)
def test_bad_settings_are_refused(model: DeepSeekV3, settings) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings)).split("_")[0]):
        Engine(model, EngineConfig(compile_at_start=False, **settings))


def test_drafts_need_an_mtp_module() -> None:
    config = ModelConfig.preset("tiny", num_nextn_predict_layers=0)
    with pytest.raises(ConfigError, match="MTP"):
        Engine(small_model(config, 0), EngineConfig(drafts=1))
