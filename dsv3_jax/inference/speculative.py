"""Self-speculation with the multi-token prediction module (report sections 2.2 and 5.4.3), greedy.

The MTP module drafts the token after the next one; the main model reads the next token and the draft in one step,
and where its own choice is the draft, that step has produced two tokens instead of one. What is written is what the
main model alone would write.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.errors import UserError
from dsv3_jax.inference.generate import cut_at_stop
from dsv3_jax.inference.prompts import PromptBatch
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.modules.latent_cache import LatentCache


@dataclasses.dataclass(frozen=True)
class Speculation:
    """What was written, and how the drafts did.

    Attributes:
      tokens: the new tokens of each prompt, without the stop token.
      drafted, accepted: drafts checked and kept over all rows.
    """

    tokens: list[list[int]]
    drafted: int
    accepted: int

    @property
    def acceptance(self) -> float:
        """Share of the drafts that the main model would have written; 1 + acceptance tokens come of one step."""
        return self.accepted / max(self.drafted, 1)


def speculate(
    model: DeepSeekV3, prompts: Sequence[Sequence[int]], max_new_tokens: int = 64, *, stop_token: int | None = None
) -> Speculation:
    """Greedy `complete`, with drafts of the first MTP module.

    Raises:
      UserError: the model has no MTP module, or one that wants hidden states from before the final norm; and as
        `complete`.
    """
    if not model.config.num_nextn_predict_layers or not model.config.mtp_hidden_after_final_norm:
        raise UserError(
            "self-speculation needs a model with an MTP module that reads hidden states after the final norm "
            "(num_nextn_predict_layers > 0, mtp_hidden_after_final_norm); use generate"
        )
    batch = PromptBatch.pad(prompts)
    batch.check(model.config, max_new_tokens)
    graph, weights = nnx.split(model)
    end = _run(graph, weights, batch.tokens, batch.lengths, max_new_tokens=max_new_tokens, stop_token=stop_token)
    rows = [row[:count].tolist() for row, count in zip(np.asarray(end.written), np.asarray(end.count), strict=True)]
    return Speculation([cut_at_stop(row, stop_token) for row in rows], int(end.drafted), int(end.accepted))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Progress:
    """Where each row stands.

    Attributes:
      tokens: the last two tokens chosen; the main cache ends before the second.
      hidden: the main model's hidden states one place before each, which the MTP module joins with them.
      position: place of the second.
      written, count: the new tokens and how many there are.
    """

    tokens: Int[Array, "B 2"]
    hidden: Float[Array, "B 2 d"]
    position: Int[Array, " B"]
    cache: LatentCache
    written: Int[Array, "B N"]
    count: Int[Array, " B"]
    finished: Bool[Array, " B"]
    drafted: Int[Array, ""]
    accepted: Int[Array, ""]


@functools.partial(jax.jit, static_argnames=("graph", "max_new_tokens", "stop_token"))
def _run(
    graph: Any,
    weights: Any,
    tokens: Int[Array, "B W"],
    lengths: Int[Array, " B"],
    *,
    max_new_tokens: int,
    stop_token: int | None,
) -> _Progress:
    model = nnx.merge(graph, weights)
    start = _start(model, tokens, lengths, max_new_tokens, stop_token)
    return lax.while_loop(
        lambda progress: ~progress.finished.all(), lambda progress: _advance(model, progress, stop_token), start
    )


def _start(
    model: DeepSeekV3, tokens: Int[Array, "B W"], lengths: Int[Array, " B"], new: int, stop_token: int | None
) -> _Progress:
    """Reads the prompts with the main model and the MTP module, and chooses the first token."""
    batch, width = tokens.shape
    hidden, cache = model.prefill(tokens, model.init_cache(batch, width + new + 1, mtp=True))
    positions = jnp.broadcast_to(jnp.arange(width - 1), (batch, width - 1))
    _, cache = model.draft(hidden[:, :-1], tokens[:, 1:], cache, positions)

    last = (lengths - 1)[:, None] + jnp.arange(-1, 1)  # a prompt of one token has no place before its last
    pair = jnp.take_along_axis(hidden, jnp.maximum(last, 0)[..., None], axis=1)
    first = jnp.argmax(model.head(pair[:, 1]), axis=-1).astype(jnp.int32)
    before = jnp.take_along_axis(tokens, last[:, 1:], axis=1)[:, 0]
    zero = jnp.zeros((), jnp.int32)
    return _Progress(
        tokens=jnp.stack([before, first], axis=1),
        hidden=pair,
        position=lengths.astype(jnp.int32),
        cache=cache,
        written=jnp.zeros((batch, new), jnp.int32).at[:, 0].set(first),
        count=jnp.ones((batch,), jnp.int32),
        finished=_ends(first, stop_token) | (new == 1),
        drafted=zero,
        accepted=zero,
    )


def _advance(model: DeepSeekV3, progress: _Progress, stop_token: int | None) -> _Progress:
    """One draft and its check: one or two tokens more for every unfinished row."""
    pair = jnp.arange(2)
    # Both places again, since after an accepted draft the MTP cache lacks the first. Place -1 is beyond the cache's
    # end for it, which drops it.
    places = progress.position[:, None] + pair - 2
    places = jnp.where(places < 0, progress.cache.latent.shape[2], places)
    hidden, cache = model.draft(progress.hidden, progress.tokens, progress.cache, places)
    draft = jnp.argmax(model.head(hidden[:, 1]), axis=-1).astype(jnp.int32)

    current = progress.tokens[:, 1]
    hidden, cache = model.decode(jnp.stack([current, draft], axis=1), cache, progress.position[:, None] + pair)
    chosen = jnp.argmax(model.head(hidden), axis=-1).astype(jnp.int32)
    accepted = chosen[:, 0] == draft

    active = ~progress.finished
    room = progress.written.shape[1]
    two = active & accepted & ~_ends(chosen[:, 0], stop_token) & (progress.count + 1 < room)
    rows = jnp.arange(chosen.shape[0])
    # Places beyond the end are dropped.
    written = progress.written.at[rows, jnp.where(active, progress.count, room)].set(chosen[:, 0], mode="drop")
    written = written.at[rows, jnp.where(two, progress.count + 1, room)].set(chosen[:, 1], mode="drop")
    count = progress.count + active + two
    last = jnp.where(two, chosen[:, 1], chosen[:, 0])
    return _Progress(
        tokens=jnp.where(two[:, None], chosen, jnp.stack([current, chosen[:, 0]], axis=1)),
        hidden=jnp.where(two[:, None, None], hidden, jnp.stack([progress.hidden[:, 1], hidden[:, 0]], axis=1)),
        position=progress.position + active + two,
        cache=cache,
        written=written,
        count=count,
        finished=progress.finished | _ends(last, stop_token) | (count >= room),
        drafted=progress.drafted + jnp.sum(active),
        accepted=progress.accepted + jnp.sum(active & accepted),
    )


def _ends(token: Int[Array, " B"], stop_token: int | None) -> Bool[Array, " B"]:
    return jnp.zeros(token.shape, bool) if stop_token is None else token == stop_token
