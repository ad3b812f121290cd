"""Checks that speculative decoding writes what greedy generation writes, and counts its drafts correctly."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_data import build_model, load_golden
from small_models import small_model

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import UserError
from dsv3_jax.inference import complete, speculate
from dsv3_jax.model import DeepSeekV3

# Prompts of one token, of an odd and of an even number of tokens.
PROMPTS = [[1], [0, 3, 2, 2, 1], [2, 1, 0, 3, 1, 1, 0, 2]]
NEW = 40


@pytest.fixture(scope="module")
def model() -> DeepSeekV3:
    """Returns a model with a vocabulary of four, so that its untrained MTP module is often right and often wrong."""
    config = ModelConfig.preset("tiny", vocab_size=4, initializer_range=0.2)
    return small_model(config, 3)


def count_drafts(model: DeepSeekV3, prompt: list[int], text: list[int]) -> tuple[int, int]:
    """Returns the numbers of drafts checked and accepted, from one forward pass over the whole text."""
    ids = np.asarray(prompt + text)
    drafts = np.asarray(
        nnx.jit(lambda model, ids: model(ids).mtp_logits[0])(model, jnp.asarray(ids)[None])[0].argmax(-1)
    )
    position, drafted, accepted = len(prompt), 0, 0
    while position + 1 < len(ids):
        right = drafts[position - 1] == ids[position + 1]
        drafted, accepted, position = drafted + 1, accepted + right, position + 1 + right
    return drafted, accepted


def test_tokens_and_counts(model: DeepSeekV3) -> None:
    plain = complete(model, PROMPTS, NEW)
    result = speculate(model, PROMPTS, NEW)
    assert result.tokens == plain
    counts = np.sum([count_drafts(model, *row) for row in zip(PROMPTS, plain, strict=True)], axis=0)
    assert [result.drafted, result.accepted] == counts.tolist()
    assert 0.1 < result.acceptance < 0.9


def test_stop_token(model: DeepSeekV3) -> None:
    plain = complete(model, PROMPTS, NEW)
    stop = 0
    assert [stop in text for text in plain] == [False, True, True]
    want = [text[: text.index(stop)] if stop in text else text for text in plain]
    result = speculate(model, PROMPTS, NEW, stop_token=stop)
    assert result.tokens == want
    # A row that ends at its stop token checks as many drafts as one that may write no more tokens than that.
    ended = [speculate(model, [prompt], min(len(text) + 1, NEW)) for prompt, text in zip(PROMPTS, want, strict=True)]
    assert result.drafted == sum(one.drafted for one in ended)
    assert result.accepted == sum(one.accepted for one in ended)


def test_golden_greedy_text() -> None:
    golden = load_golden("v3_negative_bias")
    text = golden.io["greedy"][0].tolist()
    assert speculate(build_model(golden), [text[:16]], len(text) - 16).tokens == [text[16:]]


def test_one_new_token(model: DeepSeekV3) -> None:
    result = speculate(model, PROMPTS, 1)
    assert result.tokens == complete(model, PROMPTS, 1)
    assert result.drafted == 0


def test_a_model_without_mtp_is_refused() -> None:
    config = ModelConfig.preset("tiny", num_nextn_predict_layers=0)
    with pytest.raises(UserError, match="MTP"):
        speculate(nnx.eval_shape(lambda: DeepSeekV3(config, rngs=nnx.Rngs(0))), [[1]], 1)
