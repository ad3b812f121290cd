"""Greedy self-speculation with the multi-token prediction (MTP) module (report sections 2.2 and 5.4.3).

The MTP module drafts the token after the next one. The main model reads the next token and the draft in one step; where
its own choice equals the draft, the step has produced two tokens. The text is the same as without drafts.
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
from dsv3_jax.inference.generate import StopTokens, cut_at_stop, ends, stop_ids
from dsv3_jax.inference.prompts import PromptBatch
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.modules.latent_cache import LatentCache


@dataclasses.dataclass(frozen=True)
class Speculation:
    """The result of self-speculation.

    Attributes:
      tokens: the new tokens of each prompt, without the stop token.
      drafted: number of drafts that were checked, over all rows.
      accepted: number of drafts that were kept, over all rows.
    """

    tokens: list[list[int]]
    drafted: int
    accepted: int

    @property
    def acceptance(self) -> float:
        """Fraction of the drafts that were kept. A step produces 1 + acceptance tokens on average."""
        return self.accepted / max(self.drafted, 1)


def speculate(
    model: DeepSeekV3, prompts: Sequence[Sequence[int]], max_new_tokens: int = 64, *, stop_token: StopTokens = None
) -> Speculation:
    """Generates the same tokens as a greedy `complete`, with drafts of the first MTP module.

    Args:
      model: a model with an MTP module.
      prompts: token ids of each prompt.
      max_new_tokens: number of tokens to generate per prompt.
      stop_token: a row ends when it produces this token, or one of these.

    Raises:
      UserError: the model has no MTP module, or one that reads hidden states from before the final norm; or as
        `generate` raises it.
    """
    if not model.config.num_nextn_predict_layers or not model.config.mtp_hidden_after_final_norm:
        raise UserError(
            "self-speculation needs a model with an MTP module that reads hidden states after the final norm "
            "(num_nextn_predict_layers > 0, mtp_hidden_after_final_norm); use generate"
        )
    batch = PromptBatch.pad(prompts)
    batch.check(model.config, max_new_tokens)
    graph, weights = nnx.split(model)
    end = _run(graph, weights, batch.tokens, batch.lengths, max_new_tokens=max_new_tokens, stops=stop_ids(stop_token))
    rows = [row[:count].tolist() for row, count in zip(np.asarray(end.written), np.asarray(end.count), strict=True)]
    return Speculation([cut_at_stop(row, stop_token) for row in rows], int(end.drafted), int(end.accepted))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """The state of a batch during self-speculation.

    Attributes:
      tokens: the last two tokens chosen. The main model's cache ends before the second.
      hidden: the main model's hidden states at the positions before these tokens, which the MTP module reads with them.
      position: position of the second token.
      cache: latent cache of the main model and of the MTP module.
      written: the new tokens.
      count: number of new tokens of each row.
      finished: whether the row has ended.
      drafted: number of drafts checked, over all rows.
      accepted: number of drafts kept, over all rows.
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


@functools.partial(jax.jit, static_argnames=("graph", "max_new_tokens", "stops"))
def _run(
    graph: Any,
    weights: Any,
    tokens: Int[Array, "B W"],
    lengths: Int[Array, " B"],
    *,
    max_new_tokens: int,
    stops: tuple[int, ...],
) -> _State:
    model = nnx.merge(graph, weights)
    start = _start(model, tokens, lengths, max_new_tokens, stops)
    return lax.while_loop(lambda state: ~state.finished.all(), lambda state: _advance(model, state, stops), start)


def _start(
    model: DeepSeekV3, tokens: Int[Array, "B W"], lengths: Int[Array, " B"], new: int, stops: tuple[int, ...]
) -> _State:
    """Reads the prompts with the main model and the MTP module, and chooses the first token."""
    batch, width = tokens.shape
    hidden, cache = model.prefill(tokens, model.init_cache(batch, width + new + 1, mtp=True))
    positions = jnp.broadcast_to(jnp.arange(width - 1), (batch, width - 1))
    _, cache = model.draft(hidden[:, :-1], tokens[:, 1:], cache, positions)

    last = (lengths - 1)[:, None] + jnp.arange(-1, 1)  # a prompt of one token has no position before its last
    pair = jnp.take_along_axis(hidden, jnp.maximum(last, 0)[..., None], axis=1)
    first = jnp.argmax(model.head(pair[:, 1]), axis=-1).astype(jnp.int32)
    before = jnp.take_along_axis(tokens, last[:, 1:], axis=1)[:, 0]
    zero = jnp.zeros((), jnp.int32)
    return _State(
        tokens=jnp.stack([before, first], axis=1),
        hidden=pair,
        position=lengths.astype(jnp.int32),
        cache=cache,
        written=jnp.zeros((batch, new), jnp.int32).at[:, 0].set(first),
        count=jnp.ones((batch,), jnp.int32),
        finished=ends(first, stops) | (new == 1),
        drafted=zero,
        accepted=zero,
    )


def _advance(model: DeepSeekV3, state: _State, stops: tuple[int, ...]) -> _State:
    """Drafts one token and checks it; adds one or two tokens to every unfinished row."""
    pair = jnp.arange(2)
    # Both positions are read, because after an accepted draft the MTP cache lacks the first. A prompt of one token has
    # no first position (-1): it is moved beyond the end of the cache, where nothing is written.
    positions = state.position[:, None] + pair - 2
    positions = jnp.where(positions < 0, state.cache.latent.shape[2], positions)
    hidden, cache = model.draft(state.hidden, state.tokens, state.cache, positions)
    draft = jnp.argmax(model.head(hidden[:, 1]), axis=-1).astype(jnp.int32)

    current = state.tokens[:, 1]
    hidden, cache = model.decode(jnp.stack([current, draft], axis=1), cache, state.position[:, None] + pair)
    chosen = jnp.argmax(model.head(hidden), axis=-1).astype(jnp.int32)
    accepted = chosen[:, 0] == draft

    active = ~state.finished
    capacity = state.written.shape[1]
    two = active & accepted & ~ends(chosen[:, 0], stops) & (state.count + 1 < capacity)
    rows = jnp.arange(chosen.shape[0])
    # Tokens of finished rows get a position beyond the end, where they are dropped.
    written = state.written.at[rows, jnp.where(active, state.count, capacity)].set(chosen[:, 0], mode="drop")
    written = written.at[rows, jnp.where(two, state.count + 1, capacity)].set(chosen[:, 1], mode="drop")
    count = state.count + active + two
    last = jnp.where(two, chosen[:, 1], chosen[:, 0])
    return _State(
        tokens=jnp.where(two[:, None], chosen, jnp.stack([current, chosen[:, 0]], axis=1)),
        hidden=jnp.where(two[:, None, None], hidden, jnp.stack([state.hidden[:, 1], hidden[:, 0]], axis=1)),
        position=state.position + active + two,
        cache=cache,
        written=written,
        count=count,
        finished=state.finished | ends(last, stops) | (count >= capacity),
        drafted=state.drafted + jnp.sum(active),
        accepted=state.accepted + jnp.sum(active & accepted),
    )
