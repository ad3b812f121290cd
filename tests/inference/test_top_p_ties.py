"""Checks top-p where a set of tokens reaches the probability exactly: no further token is kept."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.inference.sampling import Sampler, SamplerRows, TextSoFar, adjust


@pytest.mark.parametrize(("top_p", "kept"), [(0.25, 1), (0.5, 2), (0.501, 3), (1.0, 4), (0.01, 1)])
def test_the_smallest_set_that_reaches_the_probability(top_p: float, kept: int) -> None:
    """Four tokens of a quarter each."""
    text = TextSoFar(jnp.zeros((1, 4), bool), jnp.zeros((1, 4), jnp.int32), jnp.zeros((1, 4)))
    adjusted = adjust(jnp.zeros((1, 4)), SamplerRows.of([Sampler(top_p=top_p)], [0]), text)
    assert np.isfinite(adjusted)[0].tolist() == [True] * kept + [False] * (4 - kept)
