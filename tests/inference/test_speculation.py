"""Checks that the rule of acceptance gives the distribution of plain sampling, by a chi-squared test."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from dsv3_jax.inference.sampling import GREEDY, Sampler, SamplerRows, TextSoFar, adjust, choose
from dsv3_jax.inference.speculation import DRAFT, check_draft

DRAWS, VOCABULARY = 100_000, 12


@jax.jit
def speculate(logits: jax.Array, draft_logits: jax.Array, rows: SamplerRows) -> tuple[jax.Array, jax.Array]:
    """Returns, for each row, whether its draft was accepted and the token written."""
    count = len(rows.temperature)
    shape = (count, VOCABULARY)
    text = TextSoFar(jnp.zeros(shape, bool), jnp.zeros(shape, jnp.int32), jnp.zeros(shape))
    p, q = (adjust(jnp.broadcast_to(x, shape), rows, text) for x in (logits, draft_logits))
    positions = jnp.full(count, 5)
    draft = choose(q, rows, positions, DRAFT)
    return check_draft(draft, p, q, rows, positions)


def test_the_written_token_has_the_distribution_of_plain_sampling() -> None:
    random = np.random.default_rng(0)
    logits, draft_logits = random.normal(size=(2, VOCABULARY)).astype(np.float32)
    sampler = Sampler(temperature=0.9, top_p=0.95)
    accepted, tokens = speculate(logits, draft_logits, SamplerRows.of([sampler] * DRAWS, range(DRAWS)))

    def distribution(logits: np.ndarray) -> np.ndarray:
        p = np.exp(logits.astype(np.float64) / 0.9)
        p /= p.sum()
        order = np.argsort(-p)
        p[order[np.searchsorted(np.cumsum(p[order]), 0.95) + 1 :]] = 0
        return p / p.sum()

    p, q = distribution(logits), distribution(draft_logits)
    seen = np.bincount(np.asarray(tokens), minlength=VOCABULARY)
    assert seen[p == 0].sum() == 0
    assert scipy.stats.chisquare(seen[p > 0], p[p > 0] * DRAWS).pvalue > 1e-3
    # A rule that always accepted, or never did, would be seen here; accepted drafts are sum min(p, q) of all.
    share, want = np.mean(accepted), np.minimum(p, q).sum()
    assert abs(share - want) < 5 * np.sqrt(want * (1 - want) / DRAWS)


def test_greedy_rows_accept_the_most_likely_token_alone() -> None:
    logits = np.arange(VOCABULARY, dtype=np.float32)
    rows = SamplerRows.of([GREEDY, GREEDY], [0, 0])
    assert [bool(x) for x in speculate(logits, logits, rows)[0]] == [True, True]
    accepted, tokens = speculate(logits, -logits, rows)
    assert not accepted.any()
    assert tokens.tolist() == [VOCABULARY - 1] * 2
