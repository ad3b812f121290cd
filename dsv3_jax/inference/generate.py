"""Text generation with the latent cache: the prompts at once, then token by token.

Prompts are read with keys and values expanded, which is cheaper for many tokens at a time; new tokens are
decoded in MLA's absorbed form against the cached latents (report section 2.1.1). A row's tokens depend on its
own prompt and key alone, so prompts of a batch, whatever their lengths, give the same text as each by itself.
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


def generate(
    model: DeepSeekV3,
    tokens: Int[Array, "B T"],
    max_new_tokens: int = 64,
    sampler: Sampler | None = None,
    key: Key[Array, "*B"] | None = None,
    *,
    prompt_lengths: Int[Array, " B"] | None = None,
    stop_token: int | None = None,
) -> Int[Array, "B T+N"]:
    """Continues every row by `max_new_tokens` tokens (N).

    Args:
      model: any precision; the cache has the dtype it computes in.
      tokens: prompts, padded on the right where `prompt_lengths` says so.
      sampler: greedy unless given.
      key: randomness of a sampler that is not greedy. From one key each row draws by its own prompt, as it would
        alone, so equal prompts get equal continuations; an array of B keys gives each row its own.
      prompt_lengths: tokens of each row that are prompt; all T unless given.
      stop_token: ends a row that produces it; generation ends early when all rows have.

    Returns:
      int32: each row's prompt, its new tokens right behind it, and then the stop token (0 without one) to the
        end.

    Raises:
      UserError: an empty prompt, a token outside the vocabulary, or more tokens than the model's context
        holds.
    """
    ids = np.asarray(tokens)
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"tokens must be whole numbers of shape [batch, length], not {ids.dtype}{list(ids.shape)}")
    batch, width = ids.shape
    lengths = np.full(batch, width) if prompt_lengths is None else np.asarray(prompt_lengths)
    if lengths.shape != (batch,) or lengths.min(initial=0) < 0 or lengths.max(initial=0) > width:
        raise UserError(f"prompt_lengths must be {batch} numbers from 0 to {width}, not {lengths.tolist()}")
    prompts = [row[:length] for row, length in zip(ids, lengths, strict=True)]
    new = _new_tokens(model, prompts, max_new_tokens, sampler, key, stop_token)
    result = np.full((batch, width + max_new_tokens), _filler(stop_token), np.int32)
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
    stop_token: int | None = None,
) -> list[list[int]]:
    """`generate` for prompts of any lengths: only the new tokens of each, without the stop token."""
    new = _new_tokens(model, prompts, max_new_tokens, sampler, key, stop_token)
    return [cut_at_stop(row.tolist(), stop_token) for row in new]


def stream(
    model: DeepSeekV3,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    sampler: Sampler | None = None,
    key: Key[Array, "*B"] | None = None,
    *,
    stop_token: int | None = None,
) -> Iterator[Int[np.ndarray, " B"]]:
    """The tokens of `generate` as they come: one int32 array [B] a step; rows that have stopped repeat the
    stop token.

    Arguments are checked when the function is called, not when the first token is asked for.
    """
    prompt, keys, choose = _prepare(model, prompts, max_new_tokens, sampler, key, stop_token)
    graph, weights = nnx.split(model)

    def steps() -> Iterator[Int[np.ndarray, " B"]]:
        room = prompt.tokens.shape[1] + max_new_tokens
        progress = _start_compiled(graph, weights, prompt.tokens, prompt.lengths, keys, choose=choose, room=room)
        for remaining in reversed(range(max_new_tokens)):
            yield np.asarray(progress.token)
            if not remaining or progress.finished.all():
                return
            progress = _advance_compiled(graph, weights, progress, keys, choose=choose)

    return steps()


@dataclasses.dataclass(frozen=True)
class _Choice:
    """What the compiled programs depend on beside shapes."""

    sampler: Sampler
    stop_token: int | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Progress:
    """Where a batch stands: the token chosen last, its place, the rows that stopped, how many were chosen."""

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
    stop_token: int | None,
) -> tuple[PromptBatch, Key[Array, " B"] | None, _Choice]:
    """The arguments of all entry points, checked: padded prompts, a key a row, and the rule of choice."""
    batch = PromptBatch.pad(prompts)
    batch.check(model.config, max_new_tokens)
    choice = _Choice(GREEDY if sampler is None else sampler, stop_token)
    if choice.sampler.is_greedy:
        return batch, None, choice
    if key is None:
        raise UserError("sampling at a temperature above 0 needs a random key, such as jax.random.key(0)")
    rows = len(batch.lengths)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.shape not in ((), (rows,)):
        raise UserError(f"key must be jax.random.key(...) or an array of {rows} such keys")
    if key.shape == ():
        # A prompt's own mark, not its row's number: the same noise alone as in any batch.
        marks = [zlib.crc32(row[:length]) for row, length in zip(batch.tokens, batch.lengths, strict=True)]
        key = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.asarray(marks, jnp.uint32))
    return batch, key, choice


def _new_tokens(
    model: DeepSeekV3,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampler: Sampler | None,
    key: Key[Array, "*B"] | None,
    stop_token: int | None,
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
    """The whole generation as one program, so that no step returns to Python."""
    model = nnx.merge(graph, weights)
    start = _start(model, tokens, lengths, keys, choose, tokens.shape[1] + max_new_tokens)
    written = jnp.full((tokens.shape[0], max_new_tokens), _filler(choose.stop_token), jnp.int32)

    def unfinished(carry: tuple[_Progress, Array]) -> Bool[Array, ""]:
        return (carry[0].count < max_new_tokens) & ~carry[0].finished.all()

    def step(carry: tuple[_Progress, Array]) -> tuple[_Progress, Array]:
        progress = _advance(model, carry[0], keys, choose)
        return progress, _write(carry[1], progress)

    return lax.while_loop(unfinished, step, (start, _write(written, start)))[1]


@functools.partial(jax.jit, static_argnames=("graph", "choose", "room"))
def _start_compiled(
    graph: Any,
    weights: Any,
    tokens: Int[Array, "B W"],
    lengths: Int[Array, " B"],
    keys: Key[Array, " B"] | None,
    *,
    choose: _Choice,
    room: int,
) -> _Progress:
    return _start(nnx.merge(graph, weights), tokens, lengths, keys, choose, room)


@functools.partial(jax.jit, static_argnames=("graph", "choose"), donate_argnames=("progress",))
def _advance_compiled(
    graph: Any, weights: Any, progress: _Progress, keys: Key[Array, " B"] | None, *, choose: _Choice
) -> _Progress:
    return _advance(nnx.merge(graph, weights), progress, keys, choose)


def _start(
    model: DeepSeekV3,
    tokens: Int[Array, "B W"],
    lengths: Int[Array, " B"],
    keys: Key[Array, " B"] | None,
    choose: _Choice,
    room: int,
) -> _Progress:
    """Reads the prompts and chooses each row's first token."""
    hidden, cache = model.prefill(tokens, model.init_cache(tokens.shape[0], room))
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    count = jnp.zeros((), jnp.int32)
    token = choose.sampler(model.head(last), _step_keys(keys, count))
    return _Progress(token, lengths.astype(jnp.int32), _stops(token, choose), count + 1, cache)


def _advance(model: DeepSeekV3, progress: _Progress, keys: Key[Array, " B"] | None, choose: _Choice) -> _Progress:
    """Reads the tokens chosen last and chooses the next."""
    hidden, cache = model.decode(progress.token[:, None], progress.cache, progress.position[:, None])
    token = choose.sampler(model.head(hidden[:, 0]), _step_keys(keys, progress.count))
    if choose.stop_token is not None:
        token = jnp.where(progress.finished, choose.stop_token, token)
    return _Progress(token, progress.position + 1, _stops(token, choose), progress.count + 1, cache)


def _step_keys(keys: Key[Array, " B"] | None, count: Int[Array, ""]) -> Key[Array, " B"] | None:
    """A key a row for the choice number `count`."""
    return None if keys is None else jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, count)


def _stops(token: Int[Array, " B"], choose: _Choice) -> Bool[Array, " B"]:
    return jnp.zeros(token.shape, bool) if choose.stop_token is None else token == choose.stop_token


def _write(written: Int[Array, "B N"], progress: _Progress) -> Int[Array, "B N"]:
    return lax.dynamic_update_index_in_dim(written, progress.token, progress.count - 1, axis=1)


def cut_at_stop(row: list[int], stop_token: int | None) -> list[int]:
    """The tokens before the first stop token."""
    return row[: row.index(stop_token)] if stop_token in row else row


def _filler(stop_token: int | None) -> int:
    return 0 if stop_token is None else stop_token
