"""Counts what a function keeps for its backward pass, without running it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax


def saved_bytes(function: Callable[..., Any], *arguments: Any) -> dict[str, int]:
    """Returns how many bytes the backward pass of `function` needs from its forward pass, by dtype.

    They are the values that `jax.vjp` hands on in the jaxpr, each counted once. The arguments themselves (parameters,
    tokens) are not counted, since they exist anyway. XLA may keep less, by recomputing what is cheap.

    Args:
      arguments: arrays or their shapes; `function` is differentiated in the first.
    """
    first, *others = arguments

    def residuals(first: Any, *others: Any) -> list[Any]:
        _, pull = jax.vjp(lambda first: function(first, *others), first)
        return jax.tree.leaves(pull)

    jaxpr = jax.make_jaxpr(residuals)(first, *others).jaxpr
    given = {id(variable) for variable in (*jaxpr.invars, *jaxpr.constvars)}
    kept: dict[int, Any] = {id(variable): variable.aval for variable in jaxpr.outvars if id(variable) not in given}
    total: Counter[str] = Counter()
    for aval in kept.values():
        total[str(aval.dtype)] += aval.size * aval.dtype.itemsize
    return dict(total)
