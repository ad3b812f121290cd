"""Checks the log-probabilities of prompts' tokens against the plain model's logits, in float64."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax
from small_models import small_model

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import UserError
from dsv3_jax.inference import Engine, EngineConfig, Request, Result

pytestmark = pytest.mark.slow

VOCABULARY, CONTEXT = 12, 32
MODEL = small_model(ModelConfig.preset("tiny", vocab_size=VOCABULARY, initializer_range=0.25), 3)
SETTINGS = {
    "context": CONTEXT,
    "page_size": 4,
    "chunk_sizes": (8,),
    "steps": 3,
    "score_prompts": True,
    "compile_at_start": False,
}
# The second begins as the first does, so that it could share pages; the last is one token longer than the context.
FIRST = tuple(np.random.default_rng(0).integers(0, VOCABULARY, CONTEXT + 1).tolist())
PROMPTS = [(FIRST[:20], 13), (FIRST[:24], 18), (FIRST[:2], 1), (FIRST, CONTEXT)]


@pytest.fixture(scope="module", params=[0, 1], ids=["plain", "one draft"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return Engine(MODEL, EngineConfig(max_sequences=2, chunk_rows=2, drafts=request.param, **SETTINGS))


def check(result: Result, prompt: tuple[int, ...], start: int) -> None:
    logits = np.asarray(MODEL(jnp.asarray([prompt[:-1]], jnp.int32)).logits, np.float64)[0]
    want = log_softmax(logits, axis=-1)[start - 1 :]
    assert len(result.prompt_logprobs) == len(prompt) - start
    for row, token, score in zip(want, prompt[start:], result.prompt_logprobs, strict=True):
        assert score.logprob == pytest.approx(row[token], abs=1e-5)
        ((best, value),) = score.top
        assert best == row.argmax()
        assert value == pytest.approx(row.max(), abs=1e-5)


def test_scores_are_those_of_the_plain_model(engine: Engine) -> None:
    requests = [Request(prompt=prompt, max_new_tokens=0, score_from=start) for prompt, start in PROMPTS]
    for _ in range(2):  # the second time with pages that are shared
        for (prompt, start), result in zip(PROMPTS, engine.run(requests), strict=True):
            check(result, prompt, start)
            assert (result.tokens, result.finished) == ([], "length")
    assert engine.statistics.reused_tokens > 0
    assert engine.free_pages == engine.sizes.pages


def test_scored_prompts_are_continued_as_others(engine: Engine) -> None:
    (prompt, start), plain = PROMPTS[0], Request(prompt=PROMPTS[0][0], max_new_tokens=6)
    scored = Request(prompt=prompt, max_new_tokens=6, score_from=start)
    results = engine.run([plain, scored, scored])
    assert results[0].prompt_logprobs == []
    for result in results[1:]:
        check(result, prompt, start)
        assert result.tokens == results[0].tokens


def test_a_prompt_that_was_put_back_is_scored_once() -> None:
    """Four pages hold one of the two requests to its end, so that the younger one is put back and read again."""
    engine = Engine(MODEL, EngineConfig(max_sequences=2, chunk_rows=2, drafts=0, cache_tokens=28, **SETTINGS))
    (prompt, start), other = PROMPTS[0], Request(prompt=FIRST[20:24], max_new_tokens=12)
    scored = Request(prompt=prompt, max_new_tokens=4, score_from=start)
    results = engine.run([other, scored])
    assert engine.statistics.preemptions > 0
    check(results[1], prompt, start)


@pytest.mark.parametrize(
    ("settings", "match"),
    [({"score_from": 0}, "at least 1"), ({"score_from": 2}, "less than 2"), ({}, "max_new_tokens")],
)
def test_wrong_requests_are_refused(engine: Engine, settings: dict, match: str) -> None:
    with pytest.raises(UserError, match=match):
        engine.submit(Request(prompt=(1, 2), max_new_tokens=0, **settings))


def test_an_engine_without_scores_refuses() -> None:
    engine = Engine(MODEL, EngineConfig(max_sequences=2, context=CONTEXT, compile_at_start=False))
    with pytest.raises(UserError, match="score_prompts"):
        engine.submit(Request(prompt=(1, 2), max_new_tokens=1, score_from=1))
