"""Finds the values that a compiled backward pass reads from memory, because XLA does not compute them again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

_OPAQUE = {
    *("dot_general", "ragged_dot", "ragged_dot_general", "pallas_call", "custom_call"),
    *("scan", "while", "cond", "sort", "gather", "scatter", "scatter-add", "top_k", "cumsum", "dynamic_update_slice"),
}
"""Primitives whose operands and results are arrays in memory. All others are fused into what reads their result."""

_RELABELLING = {"reshape", "squeeze", "expand_dims", "transpose", "name", "copy"}
"""Primitives whose result has the numbers of their operand, so that one array serves for both."""


def materialised_bytes(function: Callable[..., Any], params: Any, tokens: Any, *others: Any) -> float:
    """Returns the bytes of token-dependent values that differentiating `function` reads from memory.

    The values that `jax.vjp` hands to the backward pass are traced back to values that exist in memory. `tokens`
    themselves are counted where they are read; copies of parameters are not counted.

    Args:
      function: takes ((params, tokens), *others) and is differentiated in the first.
      params, tokens, others: pytrees of arrays or of their shapes.
    """

    def residuals(first: Any, *others: Any) -> list[Any]:
        _, pull = jax.vjp(lambda first: function(first, *others), first)
        return jax.tree.leaves(pull)

    jaxpr = jax.make_jaxpr(residuals)((params, tokens), *others).jaxpr
    start, count = len(jax.tree.leaves(params)), len(jax.tree.leaves(tokens))
    arrays = _Arrays()
    for variable in jaxpr.invars[start : start + count]:
        arrays.materialise(variable)
    arrays.follow(jaxpr)
    read = {array for variable in jaxpr.outvars for array in arrays.behind(variable)}
    return float(sum(arrays.bytes[array] for array in read))


class _Arrays:
    """For every token-dependent value of a jaxpr, the arrays in memory from which it is computed."""

    def __init__(self) -> None:
        self.bytes: dict[Any, int] = {}  # of the variables that are arrays in memory
        self._same: dict[Any, Any] = {}  # a variable with the same numbers
        self._behind: dict[Any, frozenset[Any]] = {}

    def behind(self, variable: Any) -> frozenset[Any]:
        """Returns the arrays from which a value is computed; none where it does not depend on tokens."""
        if isinstance(variable, Literal):
            return frozenset()
        variable = self._same.get(variable, variable)
        return frozenset((variable,)) if variable in self.bytes else self._behind.get(variable, frozenset())

    def materialise(self, variable: Any) -> None:
        """Makes a value one that exists in memory."""
        variable = self._same.get(variable, variable)
        self.bytes[variable] = variable.aval.size * variable.aval.dtype.itemsize

    def follow(self, jaxpr: Jaxpr) -> None:
        """Follows all equations of a jaxpr."""
        for equation in jaxpr.eqns:
            operands = [variable for variable in equation.invars if self.behind(variable)]
            if not operands:
                continue
            inner = _called(equation)
            if inner is not None:
                for variable, outer in zip(inner.invars, equation.invars, strict=True):
                    self._pass_on(outer, variable)
                self.follow(inner)
                for variable, outer in zip(inner.outvars, equation.outvars, strict=True):
                    self._pass_on(variable, outer)
            elif equation.primitive.name in _OPAQUE:
                for variable in (*operands, *equation.outvars):
                    self.materialise(variable)
            elif equation.primitive.name in _RELABELLING:
                self._pass_on(equation.invars[0], equation.outvars[0])
            else:
                behind = frozenset[Any]().union(*map(self.behind, operands))
                for variable in equation.outvars:
                    self._behind[variable] = behind
                if _narrows(equation):
                    self.materialise(equation.outvars[0])

    def _pass_on(self, variable: Any, to: Any) -> None:
        if self.behind(variable):
            self._same[to] = self._same.get(variable, variable)


def _called(equation: JaxprEqn) -> Jaxpr | None:
    """Returns the jaxpr that an equation does no more than call."""
    if equation.primitive.name in _OPAQUE:
        return None
    for value in equation.params.values():
        if isinstance(value, ClosedJaxpr | Jaxpr):
            return value.jaxpr if isinstance(value, ClosedJaxpr) else value
    return None


def _narrows(equation: JaxprEqn) -> bool:
    """Whether a value is converted to a smaller dtype: it is then stored as such, and the wider one is not."""
    if equation.primitive.name != "convert_element_type":
        return False
    operand: Any = equation.invars[0].aval
    result: Any = equation.outvars[0].aval
    before, after = operand.dtype, result.dtype
    return after != jnp.bool_ and after.itemsize < before.itemsize
