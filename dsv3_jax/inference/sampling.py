"""How the next token is chosen from its logits, by rules that may differ from row to row of a batch.

    logits -> + logit bias -> penalties -> / temperature -> top-k -> top-p -> min-p -> draw

One program serves all requests: every setting is a number per row (`SamplerRows`). Rarely needed work is skipped when
no row needs it; whether it is done changes no other row's result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from dsv3_jax.errors import UserError

_COLDEST = 1e-30  # logits divided by less would be infinite
_CANDIDATES = 64  # most likely tokens that are looked at before the whole vocabulary is sorted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """The rule by which the next token is chosen.

    The logits are divided by the temperature; the `top_k` largest are kept; of these, renormalised, the smallest set of
    most likely tokens whose probability reaches `top_p`; of these, tokens of at least `min_p` times the probability of
    the most likely one. Of equally likely tokens the first are kept. The most likely token is always kept.

    Attributes:
      temperature: divides the logits; 0, and anything below 1e-30, always takes the most likely token.
      top_k: number of tokens to keep; None keeps all.
      top_p: probability to keep, above 0 and at most 1; None keeps all.
      min_p: least probability to keep, as a fraction of the most likely token's, 0 to 1.
      repetition_penalty: divides positive logits and multiplies negative ones, of tokens in the prompt or new text.
      presence_penalty: subtracted from the logits of tokens that are in the new text.
      frequency_penalty: subtracted from the logits of tokens once for each time they are in the new text.
      logit_bias: pairs of a token and what is added to its logit.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature must be 0 (greedy) or positive and finite, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k must be at least 1, not {self.top_k}; leave it out to keep every token")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p must be from 0 to 1, not {self.min_p}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise UserError(f"repetition_penalty must be positive, not {self.repetition_penalty}; 1 is no penalty")
        for name in ("presence_penalty", "frequency_penalty"):
            if not abs(getattr(self, name)) < float("inf"):
                raise UserError(f"{name} must be a finite number, not {getattr(self, name)}")

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always chosen, without randomness."""
        return self.temperature < _COLDEST

    @property
    def counts_tokens(self) -> bool:
        """Whether the choice depends on the text so far or on a logit bias."""
        plain = self.repetition_penalty == 1 and self.presence_penalty == 0 and self.frequency_penalty == 0
        return not plain or bool(self.logit_bias)


GREEDY = Sampler(temperature=0.0)
DEFAULT = Sampler(temperature=0.8, top_p=0.95)
"""How tokens are chosen where nobody says: greedy text repeats itself, and the unlikeliest tokens derail a text."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplerRows:
    """The sampler of each row, as arrays. `key` is the request's seed, as key data of JAX's threefry generator."""

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    repetition_penalty: Float[Array, " B"]
    presence_penalty: Float[Array, " B"]
    frequency_penalty: Float[Array, " B"]
    counts_tokens: Bool[Array, " B"]
    key: UInt32[Array, "B 2"]

    @classmethod
    def of(cls, samplers: Sequence[Sampler], seeds: Sequence[int]) -> SamplerRows:
        """Returns the rows of these samplers."""

        def numbers(name: str) -> Any:
            return np.asarray([getattr(sampler, name) for sampler in samplers], np.float32)

        arrays: dict[str, Any] = {
            "temperature": np.asarray([0 if s.is_greedy else s.temperature for s in samplers], np.float32),
            "top_k": np.asarray([sampler.top_k or np.iinfo(np.int32).max for sampler in samplers], np.int32),
            "top_p": np.asarray([2.0 if s.top_p is None or s.top_p == 1 else s.top_p for s in samplers], np.float32),
            "min_p": numbers("min_p"),
            "repetition_penalty": numbers("repetition_penalty"),
            "presence_penalty": numbers("presence_penalty"),
            "frequency_penalty": numbers("frequency_penalty"),
            "counts_tokens": np.asarray([sampler.counts_tokens for sampler in samplers]),
            "key": np.asarray([(seed >> 32, seed & 0xFFFFFFFF) for seed in seeds], np.uint32),
        }
        return cls(**arrays)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextSoFar:
    """What penalties and the logit bias need of each row.

    Attributes:
      in_prompt: whether a token is in the prompt.
      count: how often it is in the new text.
      bias: the logit bias.
    """

    in_prompt: Bool[Array, "B V"]
    count: Int[Array, "B V"]
    bias: Float[Array, "B V"]

    def with_token(self, token: Int[Array, " B"], counted: Bool[Array, " B"]) -> TextSoFar:
        """Returns the text with one more token in the rows where `counted`."""
        rows = jnp.arange(len(token))
        return dataclasses.replace(self, count=self.count.at[rows, token].add(counted.astype(self.count.dtype)))


def adjust(logits: Float[Array, "B V"], rows: SamplerRows, text: TextSoFar) -> Float[Array, "B V"]:
    """Returns the logits of the tokens that may be chosen, divided by the temperature; -inf for the others.

    In a greedy row only logit bias and penalties are applied.
    """

    def penalise(logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        biased = logits + text.bias
        seen = text.in_prompt | (text.count > 0)
        penalty = rows.repetition_penalty[:, None]
        changed = jnp.where(seen, jnp.where(biased > 0, biased / penalty, biased * penalty), biased)
        changed -= rows.presence_penalty[:, None] * (text.count > 0) + rows.frequency_penalty[:, None] * text.count
        return jnp.where(rows.counts_tokens[:, None], changed, logits)

    logits = lax.cond(jnp.any(rows.counts_tokens), penalise, lambda logits: logits, logits.astype(jnp.float32))
    drawn = rows.temperature > 0
    logits = logits / jnp.where(drawn, rows.temperature, 1)[:, None]
    narrow = drawn & ((rows.top_k < logits.shape[1]) | (rows.top_p <= 1) | (rows.min_p > 0))

    def leave_out(logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        least, number = _least_kept(logits, rows)
        above, equal = logits > least[:, None], logits == least[:, None]
        room = number - jnp.sum(above, axis=-1)
        kept = above | (equal & (jnp.cumsum(equal, axis=-1) <= room[:, None]))
        return jnp.where(kept | ~narrow[:, None], logits, -jnp.inf)

    return lax.cond(jnp.any(narrow), leave_out, lambda logits: logits, logits)


def _least_kept(logits: Float[Array, "B V"], rows: SamplerRows) -> tuple[Float[Array, " B"], Int[Array, " B"]]:
    """Returns the smallest logit that top-k, top-p and min-p keep, and how many tokens they keep."""
    vocabulary = logits.shape[1]
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    few = min(_CANDIDATES, vocabulary)
    largest = lax.top_k(logits, few)[0]
    *found, known = _least_of_sorted(largest, total, rows, vocabulary)

    def sort_all(found: tuple[Array, Array]) -> tuple[Array, Array]:
        least, number, _ = _least_of_sorted(-jnp.sort(-logits, axis=-1), total, rows, vocabulary)
        return jnp.where(known, found[0], least), jnp.where(known, found[1], number)

    return lax.cond(jnp.all(known), lambda found: found, sort_all, tuple(found))


def _least_of_sorted(
    ordered: Float[Array, "B C"], total: Float[Array, "B 1"], rows: SamplerRows, vocabulary: int
) -> tuple[Float[Array, " B"], Int[Array, " B"], Bool[Array, " B"]]:
    """Returns the smallest kept of the C largest logits, the number kept, and whether the C hold all kept ones."""
    candidates = ordered.shape[1]
    rank = jnp.arange(candidates)
    kept = rank < rows.top_k[:, None]
    shares = jnp.where(kept, jnp.exp(ordered - total), 0)
    cumulative = jnp.cumsum(shares, axis=-1)
    # top-p counts from the tokens that top-k kept; the whole vocabulary's probability is 1.
    mass = jnp.where(rows.top_k < vocabulary, cumulative[:, -1], 1.0)[:, None]
    kept &= cumulative - shares < rows.top_p[:, None] * mass
    kept &= ordered >= ordered[:, :1] + jnp.log(rows.min_p)[:, None]
    kept |= rank == 0
    number = jnp.sum(kept, axis=-1)
    complete = (number < candidates) & ((rows.top_k <= candidates) | (rows.top_k >= vocabulary))
    least = jnp.take_along_axis(ordered, number[:, None] - 1, axis=1)[:, 0]
    return least, number, complete | (candidates == vocabulary)


def draw_keys(rows: SamplerRows, positions: Int[Array, " B"], purpose: int) -> Key[Array, " B"]:
    """Returns one key per row, for one `purpose` at one position of its sequence."""

    def derive(data: UInt32[Array, " 2"], position: Int[Array, ""]) -> Key[Array, ""]:
        key = jax.random.wrap_key_data(data, impl="threefry2x32")
        return jax.random.fold_in(jax.random.fold_in(key, position), purpose)

    return jax.vmap(derive)(rows.key, positions)


def likeliest(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    """Returns the first of the largest logits of each row.

    XLA's CPU backend computes `jnp.argmax`, a reduction of pairs, several times slower than two plain reductions.
    """
    vocabulary = logits.shape[-1]
    largest = jnp.max(logits, axis=-1, keepdims=True)
    tokens = jnp.where(logits == largest, jnp.arange(vocabulary, dtype=jnp.int32), vocabulary - 1)
    return jnp.min(tokens, axis=-1)


def choose(
    adjusted: Float[Array, "B V"], rows: SamplerRows, positions: Int[Array, " B"], purpose: int
) -> Int[Array, " B"]:
    """Returns a token per row: drawn from the softmax of adjusted logits, or in greedy rows the most likely.

    Args:
      positions, purpose: what the random numbers are for, as in `draw_keys`.
    """
    best = likeliest(adjusted)

    def draw() -> Int[Array, " B"]:
        keys = draw_keys(rows, positions, purpose)
        drawn = jax.vmap(jax.random.categorical)(keys, adjusted).astype(jnp.int32)
        return jnp.where(rows.temperature > 0, drawn, best)

    return lax.cond(jnp.any(rows.temperature > 0), draw, lambda: best)
