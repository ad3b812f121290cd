"""Text generation with the latent cache: the prompts are read at once, then tokens are generated one by one.

Prompts are read in MLA's expanded form (keys and values of every head are computed), which is cheaper for many tokens
at a time. New tokens are decoded in the absorbed form, directly on the cached latents (report section 2.1.1). Under the
FP8 recipe both forms multiply by FP8 weights, and all linear maps but the absorbed ones round their inputs to FP8 too.

No row sees another: what the other prompts of a batch hold changes nothing about a row's tokens, with these exceptions.
A batch of another size, or padded to another width, is another compiled program, whose sums and intermediate roundings
may be in another order. In float32 that changes a text only where two tokens are as likely as rounding can tell. In
bfloat16 and FP8 it changes the likelihoods by the format's own rounding error, so that a prompt may continue otherwise
alone than in a batch. A recipe with one scale per tensor (`tile=0`) shares that scale among the rows.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Int, Key

from dsv3_jax.errors import UserError
from dsv3_jax.inference.prompts import PromptBatch
from dsv3_jax.inference.sampling import GREEDY, Sampler
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.modules.latent_cache import LatentCache

StopTokens = int | Sequence[int] | None
"""A token that ends a row, or several, or none."""


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
      sampler: how tokens are chosen; always the most likely one if not given.
      key: random key, needed if the sampler is not greedy. With one key, the randomness of a row depends only on its
        prompt: it does not change with the batch, and identical prompts get identical text. B keys give every row its
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
    prompts = [row[:length] for row, length in zip(ids, lengths, strict=True)]
    new = _new_tokens(model, prompts, max_new_tokens, sampler, key, stop_token)
    result = np.full((batch, width + max_new_tokens), _filler(stop_ids(stop_token)), np.int32)
    for row, prompt, written in zip(result, prompts, new, strict=True):
        row[: len(prompt)] = prompt
        row[len(prompt) : len(prompt) + max_new_tokens] = written
    return jnp.asarray(result)


def complete(
    model: DeepSeekV3,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    sampler: Sampler | None = None,
    key: Key[Array, "*B"] | None = None,
    *,
    stop_token: StopTokens = None,
) -> list[list[int]]:
    """Returns the new tokens of each prompt, without the stop token. Arguments as of `generate`."""
    new = _new_tokens(model, prompts, max_new_tokens, sampler, key, stop_token)
    return [cut_at_stop(row.tolist(), stop_token) for row in new]


def stream(
    model: DeepSeekV3,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    sampler: Sampler | None = None,
    key: Key[Array, "*B"] | None = None,
    *,
    stop_token: StopTokens = None,
) -> Iterator[Int[np.ndarray, " B"]]:
    """Yields one token per prompt and step, int32 [B], as they are generated. Arguments as of `generate`.

    Rows that have ended repeat the (first) stop token. The arguments are checked when the function is called.
    """
    prompt, keys, choose = _prepare(model, prompts, max_new_tokens, sampler, key, stop_token)
    graph, weights = nnx.split(model)

    def steps() -> Iterator[Int[np.ndarray, " B"]]:
        capacity = prompt.tokens.shape[1] + max_new_tokens
        state = _start_compiled(graph, weights, prompt.tokens, prompt.lengths, keys, choose=choose, capacity=capacity)
        for remaining in reversed(range(max_new_tokens)):
            yield np.asarray(state.token)
            if not remaining or state.finished.all():
                return
            state = _advance_compiled(graph, weights, state, keys, choose=choose)

    return steps()


@dataclasses.dataclass(frozen=True)
class _Choice:
    """How tokens are chosen; a static argument of the compiled programs."""

    sampler: Sampler
    stops: tuple[int, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """The state of a batch during generation.

    Attributes:
      token: the token chosen last.
      position: its position in the sequence.
      finished: whether the row has ended.
      count: number of tokens chosen so far.
      cache: the latent cache of all tokens before `token`.
    """

    token: Int[Array, " B"]
    position: Int[Array, " B"]
    finished: Bool[Array, " B"]
    count: Int[Array, ""]
    cache: LatentCache


def _prepare(
    model: DeepSeekV3,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampler: Sampler | None,
    key: Key[Array, "*B"] | None,
    stop_token: StopTokens,
) -> tuple[PromptBatch, Key[Array, " B"] | None, _Choice]:
    """Checks the arguments; returns the padded prompts, one key per row, and how tokens are chosen."""
    batch = PromptBatch.pad(prompts)
    batch.check(model.config, max_new_tokens)
    choice = _Choice(GREEDY if sampler is None else sampler, stop_ids(stop_token))
    if choice.sampler.is_greedy:
        return batch, None, choice
    if key is None:
        raise UserError("sampling at a temperature above 0 needs a random key, such as jax.random.key(0)")
    rows = len(batch.lengths)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.shape not in ((), (rows,)):
        raise UserError(f"key must be jax.random.key(...) or an array of {rows} such keys")
    if key.shape == ():
        # Derived from the prompt, not from the row number, so that a prompt draws the same alone and in any batch.
        marks = [zlib.crc32(row[:length]) for row, length in zip(batch.tokens, batch.lengths, strict=True)]
        key = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.asarray(marks, jnp.uint32))
    return batch, key, choice


def _new_tokens(
    model: DeepSeekV3,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampler: Sampler | None,
    key: Key[Array, "*B"] | None,
    stop_token: StopTokens,
) -> Int[np.ndarray, "B N"]:
    prompt, keys, choice = _prepare(model, prompts, max_new_tokens, sampler, key, stop_token)
    graph, weights = nnx.split(model)
    return np.asarray(
        _generate_compiled(
            graph, weights, prompt.tokens, prompt.lengths, keys, choose=choice, max_new_tokens=max_new_tokens
        )
    )


@functools.partial(jax.jit, static_argnames=("graph", "choose", "max_new_tokens"))
def _generate_compiled(
    graph: Any,
    weights: Any,
    tokens: Int[Array, "B W"],
    lengths: Int[Array, " B"],
    keys: Key[Array, " B"] | None,
    *,
    choose: _Choice,
    max_new_tokens: int,
) -> Int[Array, "B N"]:
    """Generates all tokens in one compiled program, without returning to Python between steps."""
    model = nnx.merge(graph, weights)
    start = _start(model, tokens, lengths, keys, choose, tokens.shape[1] + max_new_tokens)
    written = jnp.full((tokens.shape[0], max_new_tokens), _filler(choose.stops), jnp.int32)

    def unfinished(carry: tuple[_State, Array]) -> Bool[Array, ""]:
        return (carry[0].count < max_new_tokens) & ~carry[0].finished.all()

    def step(carry: tuple[_State, Array]) -> tuple[_State, Array]:
        state = _advance(model, carry[0], keys, choose)
        return state, _write(carry[1], state)

    return lax.while_loop(unfinished, step, (start, _write(written, start)))[1]


@functools.partial(jax.jit, static_argnames=("graph", "choose", "capacity"))
def _start_compiled(
    graph: Any,
    weights: Any,
    tokens: Int[Array, "B W"],
    lengths: Int[Array, " B"],
    keys: Key[Array, " B"] | None,
    *,
    choose: _Choice,
    capacity: int,
) -> _State:
    return _start(nnx.merge(graph, weights), tokens, lengths, keys, choose, capacity)


@functools.partial(jax.jit, static_argnames=("graph", "choose"), donate_argnames=("state",))
def _advance_compiled(
    graph: Any, weights: Any, state: _State, keys: Key[Array, " B"] | None, *, choose: _Choice
) -> _State:
    return _advance(nnx.merge(graph, weights), state, keys, choose)


def _start(
    model: DeepSeekV3,
    tokens: Int[Array, "B W"],
    lengths: Int[Array, " B"],
    keys: Key[Array, " B"] | None,
    choose: _Choice,
    capacity: int,
) -> _State:
    """Reads the prompts and chooses each row's first token."""
    hidden, cache = model.prefill(tokens, model.init_cache(tokens.shape[0], capacity))
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    count = jnp.zeros((), jnp.int32)
    token = choose.sampler(model.head(last), _step_keys(keys, count))
    return _State(token, lengths.astype(jnp.int32), ends(token, choose.stops), count + 1, cache)


def _advance(model: DeepSeekV3, state: _State, keys: Key[Array, " B"] | None, choose: _Choice) -> _State:
    """Reads the tokens chosen last and chooses the next ones."""
    hidden, cache = model.decode(state.token[:, None], state.cache, state.position[:, None])
    token = choose.sampler(model.head(hidden[:, 0]), _step_keys(keys, state.count))
    if choose.stops:
        token = jnp.where(state.finished, choose.stops[0], token)
    return _State(token, state.position + 1, ends(token, choose.stops), state.count + 1, cache)


def _step_keys(keys: Key[Array, " B"] | None, count: Int[Array, ""]) -> Key[Array, " B"] | None:
    """Returns one key per row for token number `count`."""
    return None if keys is None else jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, count)


def stop_ids(stop_token: StopTokens) -> tuple[int, ...]:
    """Returns the tokens that end a row."""
    if stop_token is None:
        return ()
    return (stop_token,) if isinstance(stop_token, int) else tuple(stop_token)


def ends(token: Int[Array, " B"], stops: tuple[int, ...]) -> Bool[Array, " B"]:
    """Returns for each row whether its token ends it."""
    return functools.reduce(jnp.logical_or, (token == stop for stop in stops), jnp.zeros(token.shape, bool))


def _write(written: Int[Array, "B N"], state: _State) -> Int[Array, "B N"]:
    return lax.dynamic_update_index_in_dim(written, state.token, state.count - 1, axis=1)


def cut_at_stop(row: list[int], stop_token: StopTokens) -> list[int]:
    """Returns the tokens before the first stop token."""
    stops = stop_ids(stop_token)
    return row[: next((index for index, token in enumerate(row) if token in stops), len(row))]


def _filler(stops: tuple[int, ...]) -> int:
    return stops[0] if stops else 0
