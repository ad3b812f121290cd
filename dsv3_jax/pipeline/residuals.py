"""Keeps what a layer's backward pass needs of its forward pass in the slots of a pipeline rank (report section 3.2.1).

The residuals of `jax.vjp` are arrays. Those that depend on the layer's input are written to a slot by the forward pass
and read from it by every part of the backward pass. Those that depend on weights alone, such as weights in the dtype
of a product, are computed again, because they are cheap and would otherwise be kept once for every micro-batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.interpreters import partial_eval
from jaxtyping import Array, Int

Residuals = tuple[Array, ...]
ArrayType = tuple[tuple[int, ...], jnp.dtype]
"""Shape and dtype of an array."""


@dataclasses.dataclass(frozen=True)
class TwoPasses:
    """A differentiable layer, divided into a forward pass that returns residuals and a backward pass that reads them.

    Attributes:
      types: shape and dtype of every residual.
    """

    types: tuple[ArrayType, ...]
    _forward: Callable[..., list[Array]]  # (leaves of the arguments) -> all results, then the kept residuals
    _results: Any  # tree of all results
    _dtypes: Any  # of the outputs
    _again: Callable[..., list[Array]]  # (leaves of the arguments) -> the residuals that do not depend on h
    _pull: Any  # tree of the function that `jax.vjp` returns; its leaves are residuals
    _sources: tuple[tuple[bool, int], ...]  # of every leaf: whether it is kept, and its index among those that are

    @classmethod
    def of(cls, layer: Callable[[Any, Any, Any], tuple[Any, Any]], params: Any, others: Any, h: Any) -> TwoPasses:
        """Traces (params, others, h) -> (outputs, more); it is differentiated in `params` and `h`, for `outputs` alone.

        Args:
          params, others, h: pytrees of arrays or of their shapes; `h` is one array.
        """
        trees: list[Any] = []

        def run(params: Any, others: Any, h: Any) -> tuple[list[Any], list[Any]]:
            outputs, pull, more = jax.vjp(lambda params, h: layer(params, others, h), params, h, has_aux=True)
            leaves, pull_tree = jax.tree.flatten(pull)
            results, results_tree = jax.tree.flatten((outputs, more))
            trees[:] = results_tree, pull_tree, jax.tree.map(lambda output: output.dtype, outputs)
            return results, leaves

        traced = jax.make_jaxpr(run)(params, others, h)
        jaxpr = traced.jaxpr.replace(debug_info=traced.jaxpr.debug_info.with_unknown_names())
        results_tree, pull_tree, dtypes = trees
        count = results_tree.num_leaves
        kept: dict[int, Any] = {}
        again: dict[int, Any] = {}
        sources = []
        for output, variable in enumerate(jaxpr.outvars[count:], start=count):
            group = kept if _needs_last_argument(jaxpr, output) else again
            group[id(variable)] = variable
            sources.append((group is kept, list(group).index(id(variable))))
        forward = jaxpr.replace(outvars=[*jaxpr.outvars[:count], *kept.values()])
        every = [True] * len(again)
        recomputation, _ = partial_eval.dce_jaxpr(jaxpr.replace(outvars=[*again.values()]), every, instantiate=True)
        return cls(
            types=tuple((variable.aval.shape, variable.aval.dtype) for variable in kept.values()),
            _forward=jax.jit(jaxpr_as_fun(ClosedJaxpr(forward, traced.consts))),  # lowered once for all its uses
            _results=results_tree,
            _dtypes=dtypes,
            _again=jaxpr_as_fun(ClosedJaxpr(recomputation, traced.consts)),
            _pull=pull_tree,
            _sources=tuple(sources),
        )

    def forward(self, params: Any, others: Any, h: Array) -> tuple[Any, Any, Residuals]:
        """Returns the layer's outputs, what it returns besides, and the residuals."""
        results = self._forward(*jax.tree.leaves((params, others, h)))
        count = self._results.num_leaves
        outputs, more = jax.tree.unflatten(self._results, results[:count])
        return outputs, more, tuple(results[count:])

    def backward(
        self, params: Any, others: Any, like: Array, residuals: Residuals, outputs_bar: Any
    ) -> tuple[Any, Any]:
        """Returns the gradients by `params` and by `h`.

        Args:
          like: an array of the shape and dtype of `h`, whose values are not read.
          outputs_bar: gradients by the layer's outputs, in any floating dtype.
        """
        again = self._again(*jax.tree.leaves((params, others, like)))
        leaves = [residuals[index] if kept else again[index] for kept, index in self._sources]
        outputs_bar = jax.tree.map(lambda bar, dtype: bar.astype(dtype), outputs_bar, self._dtypes)
        return jax.tree.unflatten(self._pull, leaves)(outputs_bar)


def _needs_last_argument(jaxpr: Any, output: int) -> bool:
    """Whether an output of a jaxpr depends on its last argument."""
    wanted = [index == output for index in range(len(jaxpr.outvars))]
    return partial_eval.dce_jaxpr(jaxpr, wanted)[1][-1]


@dataclasses.dataclass(frozen=True)
class SlotLayout:
    """Where the residuals of every layer of a stage are in a slot.

    A slot has one buffer for every shape and dtype of residuals, with as many entries as the stage that needs most.

    Attributes:
      types: shape and dtype of the entries of each buffer.
      entries: how many entries each buffer has.
      where: by kind of layer, buffer and entry of each residual of the stage's first layer of that kind.
      strides: by kind of layer, how many entries of each buffer a layer takes.
    """

    types: tuple[ArrayType, ...]
    entries: tuple[int, ...]
    where: tuple[tuple[tuple[int, int], ...], ...]
    strides: tuple[tuple[int, ...], ...]

    @classmethod
    def of(
        cls, moe: Sequence[ArrayType], layers: Sequence[int], dense: Sequence[ArrayType] = (), dense_layers: int = 0
    ) -> SlotLayout:
        """Returns the layout of a stage's MoE layers (kind 0), and on the first stage of the dense layers (kind 1).

        Args:
          moe, dense: shape and dtype of the residuals of one layer.
          layers: how many MoE layers each stage holds.
          dense_layers: how many dense layers the first stage holds.
        """
        types = tuple(dict.fromkeys((*moe, *dense)))
        strides = tuple(tuple(Counter(kind)[type_] for type_ in types) for kind in (moe, dense))
        of_stages = [(count, dense_layers * (stage == 0)) for stage, count in enumerate(layers)]
        entries = tuple(
            max(count * of_moe + dense_count * of_dense for count, dense_count in of_stages)
            for of_moe, of_dense in zip(*strides, strict=True)
        )
        where = []
        for kind, before in ((moe, [0] * len(types)), (dense, [layers[0] * stride for stride in strides[0]])):
            found = []
            for type_ in kind:
                buffer = types.index(type_)
                found.append((buffer, before[buffer]))
                before[buffer] += 1
            where.append(tuple(found))
        return cls(types, entries, tuple(where), strides)

    @property
    def bytes_by_dtype(self) -> Counter[str]:
        """Bytes of a slot, by the dtype of its buffers."""
        found: Counter[str] = Counter()
        for (shape, dtype), count in zip(self.types, self.entries, strict=True):
            found[str(dtype)] += count * math.prod(shape) * dtype.itemsize
        return found

    def buffers(self, slots: int) -> tuple[Array, ...]:
        """Returns empty buffers for so many slots: [slots, entries, ...]."""
        return tuple(
            jnp.zeros((slots, count, *shape), dtype)
            for (shape, dtype), count in zip(self.types, self.entries, strict=True)
        )

    def write(
        self, buffers: tuple[Array, ...], slot: Int[Array, ""], kind: int, layer: Int[Array, ""], residuals: Residuals
    ) -> tuple[Array, ...]:
        """Returns the buffers with the residuals of a layer in a slot."""
        changed = list(buffers)
        for (b, entry), residual in zip(self.where[kind], residuals, strict=True):
            at = self._index(slot, entry + layer * self.strides[kind][b], residual.ndim)
            changed[b] = lax.dynamic_update_slice(changed[b], residual[None, None], at)
        return tuple(changed)

    def read(self, buffers: tuple[Array, ...], slot: Int[Array, ""], kind: int, layer: Int[Array, ""]) -> Residuals:
        """Returns the residuals of a layer from a slot."""
        found = []
        for b, entry in self.where[kind]:
            shape, _ = self.types[b]
            at = self._index(slot, entry + layer * self.strides[kind][b], len(shape))
            found.append(lax.dynamic_slice(buffers[b], at, (1, 1, *shape))[0, 0])
        return tuple(found)

    @staticmethod
    def _index(slot: Any, entry: Any, dimensions: int) -> tuple[Array, ...]:
        return tuple(jnp.asarray(index, jnp.int32) for index in (slot, entry, *[0] * dimensions))
