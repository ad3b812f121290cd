"""Text generation for a batch of prompts: `generate`, `complete` and `stream`, each a few lines on the engine."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from dsv3_jax.errors import UserError
from dsv3_jax.inference.device_sets import DeviceSets
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.engine_config import EngineConfig
from dsv3_jax.inference.requests import Request
from dsv3_jax.inference.sampling import DEFAULT, Sampler
from dsv3_jax.model import DeepSeekV3

StopTokens = int | Sequence[int] | None
"""A token that ends a row, or several, or none."""

_MOST_SEQUENCES = 64  # of a batch that run at a time
_CHUNK = 64  # tokens of a prompt that are read at a time
_STEPS, _STREAMED_STEPS = 32, 1  # decoding steps between two visits to the host


def generate(
    model: DeepSeekV3,
    tokens: Int[Array, "B T"],
    max_new_tokens: int = 64,
    sampler: Sampler | None = None,
    key: Key[Array, "*B"] | None = None,
    *,
    temperature: float | None = None,
    prompt_lengths: Int[Array, " B"] | None = None,
    stop_token: StopTokens = None,
) -> Int[Array, "B T+N"]:
    """Continues every row by N = `max_new_tokens` tokens.

    Args:
      model: a model of any precision. The cache has the dtype the model computes in.
      tokens: prompts, one per row, padded on the right.
      max_new_tokens: N.
      sampler: how tokens are chosen; at temperature 0.8 with top-p 0.95 if not given, as `dsv3 generate` does.
        `GREEDY` always takes the most likely one.
      key: random key; `jax.random.key(0)` if not given. With one key, the randomness of a row depends only on its
        prompt: batching does not change the text, and identical prompts get identical text. B keys give every row its
        own randomness.
      temperature: that of a sampler without top-k and top-p; instead of `sampler`.
      prompt_lengths: number of prompt tokens of each row; all T if not given.
      stop_token: a row ends when it produces this token, or one of these; generation ends early when all rows have
        ended.

    Returns:
      Each row's prompt, directly followed by its new tokens, filled up with the (first) stop token (0 without one),
      int32.

    Raises:
      UserError: a prompt is empty, a token is outside the vocabulary, or the tokens do not fit the model's context.
    """
    if temperature is not None:
        if sampler is not None:
            raise UserError("give a sampler or a temperature, not both")
        sampler = Sampler(temperature=temperature)
    ids = np.asarray(tokens)
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"tokens must be whole numbers of shape [batch, length], not {ids.dtype}{list(ids.shape)}")
    batch, width = ids.shape
    lengths = np.full(batch, width) if prompt_lengths is None else np.asarray(prompt_lengths)
    if lengths.shape != (batch,) or lengths.min(initial=0) < 0 or lengths.max(initial=0) > width:
        raise UserError(f"prompt_lengths must be {batch} numbers from 0 to {width}, not {lengths.tolist()}")
    prompts = [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]
    requests = _requests(model, prompts, max_new_tokens, sampler, key, stop_token)
    result = np.full((batch, width + max_new_tokens), _filler(stop_token), np.int32)
    for row, prompt, written in zip(result, prompts, _engine(model, requests, _STEPS).run(requests), strict=True):
        row[: len(prompt)] = prompt
        row[len(prompt) : len(prompt) + len(written.tokens)] = written.tokens
    return jnp.asarray(result)


def complete(
    model: DeepSeekV3,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    sampler: Sampler | None = None,
    key: Key[Array, "*B"] | None = None,
    *,
    stop_token: StopTokens = None,
    sets: DeviceSets | None = None,
    int8_weights: bool = False,
) -> list[list[int]]:
    """Returns the new tokens of each prompt, without the stop token. Arguments as of `generate`.

    Args:
      sets: meshes of the devices that read the prompts and of those that generate; the model's own devices if None.
      int8_weights: whether the weights of products are kept in int8, a quarter of float32's memory.

    Raises:
      UserError: as `generate`; or weights are to be in int8 that cannot be.
    """
    requests = _requests(model, prompts, max_new_tokens, sampler, key, stop_token)
    results = _engine(model, requests, _STEPS, sets, int8_weights).run(requests)
    return [result.tokens[:-1] if result.finished == "stop" else result.tokens for result in results]


def stream(
    model: DeepSeekV3,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    sampler: Sampler | None = None,
    key: Key[Array, "*B"] | None = None,
    *,
    stop_token: StopTokens = None,
    sets: DeviceSets | None = None,
    int8_weights: bool = False,
) -> Iterator[Int[np.ndarray, " B"]]:
    """Yields one token per prompt and step, int32 [B], as they are generated. Arguments as of `generate`.

    Rows that have ended repeat the (first) stop token. The arguments are checked when the function is called.

    Args:
      sets, int8_weights: as of `complete`.
    """
    requests = _requests(model, prompts, max_new_tokens, sampler, key, stop_token)

    def tokens() -> Iterator[Int[np.ndarray, " B"]]:
        engine = _engine(model, requests, _STREAMED_STEPS, sets, int8_weights)
        numbers = [engine.submit(request) for request in requests]
        texts: dict[int, list[int]] = {number: [] for number in numbers}
        ended: set[int] = set()
        yielded = 0
        while True:
            going = [len(texts[number]) for number in numbers if number not in ended]
            for at in range(yielded, min(going, default=max(map(len, texts.values())))):
                yield np.asarray(
                    [text[at] if at < len(text) else _filler(stop_token) for text in texts.values()], np.int32
                )
                yielded += 1
            if not engine.has_work:
                return
            for output in engine.step():
                texts[output.request_id] += output.tokens
                if output.finished:
                    ended.add(output.request_id)

    return tokens()


def _requests(
    model: DeepSeekV3,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampler: Sampler | None,
    key: Key[Array, "*B"] | None,
    stop_token: StopTokens,
) -> list[Request]:
    """Checks the arguments and returns a request per prompt."""
    if not len(prompts):
        raise UserError("no prompt was given; give at least one")
    requests = [
        Request(
            prompt=tuple(int(token) for token in prompt),
            max_new_tokens=max_new_tokens,
            sampler=sampler or DEFAULT,
            seed=seed,
            stop_tokens=_stops(stop_token),
        )
        for prompt, seed in zip(prompts, _seeds(prompts, sampler or DEFAULT, key), strict=True)
    ]
    for row, request in enumerate(requests):
        request.check(model.config, model.config.max_position_embeddings, f"prompt {row}")
    return requests


def _seeds(prompts: Sequence[Sequence[int]], sampler: Sampler, key: Key[Array, "*B"] | None) -> list[int]:
    if sampler.is_greedy:
        return [0] * len(prompts)
    if key is None:
        key = jax.random.key(0)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.shape not in ((), (len(prompts),)):
        raise UserError(f"key must be jax.random.key(...) or an array of {len(prompts)} such keys")
    if key.shape == ():
        # Derived from the prompt, not from the row number, so that a prompt draws the same alone and in any batch.
        marks = [zlib.crc32(np.asarray(prompt, np.int32).tobytes()) for prompt in prompts]
        key = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.asarray(marks, jnp.uint32))
    words = np.asarray(jax.random.key_data(key)).astype(np.uint64)
    return [int(high) << 32 | int(low) for high, low in words[:, :2]]


def _engine(
    model: DeepSeekV3,
    requests: Sequence[Request],
    steps: int,
    sets: DeviceSets | None = None,
    int8_weights: bool = False,
) -> Engine:
    """Returns an engine that these requests fit. Sizes are rounded up, so that similar batches share programs."""
    rows = min(_power_of_two(len(requests)), _MOST_SEQUENCES)
    longest = max(len(request.prompt) + request.max_new_tokens for request in requests)
    context = min(_power_of_two(max(longest, 128)), model.config.max_position_embeddings)
    config = EngineConfig(
        max_sequences=rows,
        context=context,
        chunk_sizes=(_CHUNK,),
        steps=steps,
        drafts=0,
        top_logprobs=0,
        reuse_prefixes=False,
        sets=sets,
        int8_weights=int8_weights,
        compile_at_start=False,
    )
    return Engine(model, config)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _stops(stop_token: StopTokens) -> tuple[int, ...]:
    if stop_token is None:
        return ()
    return (stop_token,) if isinstance(stop_token, int) else tuple(stop_token)


def _filler(stop_token: StopTokens) -> int:
    return next(iter(_stops(stop_token)), 0)
