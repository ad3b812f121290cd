"""Checks top-p where a set of tokens reaches the probability exactly: no further token is kept."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.inference.sampling import Sampler


@pytest.mark.parametrize(("top_p", "kept"), [(0.25, 1), (0.5, 2), (0.501, 3), (1.0, 4), (0.01, 1)])
def test_the_smallest_set_that_reaches_the_probability(top_p: float, kept: int) -> None:
    """Four tokens of a quarter each."""
    logits, tokens = Sampler(top_p=top_p).filter(jnp.zeros((1, 4)))
    assert int(np.isfinite(logits).sum()) == kept
    assert sorted(np.asarray(tokens)[0].tolist()) == [0, 1, 2, 3]
