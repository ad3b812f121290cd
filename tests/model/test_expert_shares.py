"""Checks experts computed in equal shares against every expert computed for every token, in float64."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.modules.expert_shares import apply_in_shares, share_of
from dsv3_jax.precision import Precision, grouped_linear, grouped_swiglu_linear

TOKENS, CHOSEN, EXPERTS, WIDTH, INNER = 96, 2, 5, 8, 6


def product(rows: Any, gate_up: Any, down: Any, group_sizes: Any, row_alignment: int) -> Any:
    """Applies the experts as a mixture does, in float64."""
    apply: dict[str, Any] = {"group_sizes": group_sizes, "row_alignment": row_alignment}
    apply["precision"] = Precision(name="float64", compute_dtype="float64")
    hidden = grouped_linear(rows, gate_up.reshape(gate_up.shape[0], -1, WIDTH), **apply)
    return grouped_swiglu_linear(hidden, down, **apply)


def all_experts(u: Any, gates: Any, index: Any, gate_up: Any, down: Any) -> Any:
    """Computes every expert for every token and adds up the chosen ones."""
    hidden = jnp.einsum("nd,ecid->neci", u, gate_up)
    out = jnp.einsum("nei,edi->ned", jax.nn.silu(hidden[:, :, 0]) * hidden[:, :, 1], down)
    return jnp.einsum("nk,nkd->nd", gates, jnp.take_along_axis(out, index[:, :, None], axis=1))


@pytest.mark.parametrize("load", ["even", "uneven", "two experts", "one token each"])
def test_values_and_gradients(load: str):
    random = np.random.default_rng(0)
    tokens = 3 if load == "one token each" else TOKENS
    odds = {"even": np.ones(EXPERTS), "uneven": [20, 5, 2, 1, 1]}.get(load, np.ones(EXPERTS))
    probabilities = np.asarray(odds) / np.sum(odds)
    rows = [random.choice(EXPERTS, CHOSEN, replace=False, p=probabilities) for _ in range(tokens)]
    index = np.tile([1, 3], (tokens, 1)) if load == "two experts" else np.stack(rows)
    largest = np.bincount(index.ravel(), minlength=EXPERTS).max()
    assert (largest > share_of(index.size, EXPERTS)) == (load in ("uneven", "two experts"))
    with jax.enable_x64(True):
        values = [
            jnp.asarray(random.normal(size=shape))
            for shape in ((tokens, WIDTH), (tokens, CHOSEN), (EXPERTS, 2, INNER, WIDTH), (EXPERTS, WIDTH, INNER))
        ]
        weights = jnp.asarray(random.normal(size=(tokens, WIDTH)))

        def both(apply: Any, *values: Any) -> Any:
            return jax.jit(jax.value_and_grad(lambda *v: jnp.sum(apply(*v) * weights), argnums=(0, 1, 2, 3)))(*values)

        expected = both(lambda u, g, up, down: all_experts(u, g, jnp.asarray(index), up, down), *values)
        got = both(lambda u, g, up, down: apply_in_shares(u, g, jnp.asarray(index), up, down, product), *values)
        for ours, right in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(ours, right, rtol=1e-12, atol=1e-12 * float(jnp.max(jnp.abs(right))))
