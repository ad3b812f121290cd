"""Which dimension of every parameter lies on which axis of the mesh: logical names by path, and one table of rules.

Optimizer moments, the running average and everything else shaped like the parameters follow the same paths.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Tree = Any
"""A pytree of arrays or of their shapes."""

BATCH_AXES = ("data", "fsdp", "expert")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AxisRules:
    """Mesh axes of every logical axis; one that does not divide a dimension, or is used by an earlier one, is left out.

    Attributes:
      embed: the hidden size, in every matrix one side; what FSDP divides, and the stages where they do not divide the
        layers evenly.
      wide: heads, feed-forward widths and the vocabulary: what tensor parallelism divides.
      latent: outputs of the down-projections, routers.
      expert: routed experts.   expert_width: their inner width.
      layers: the stacked layers.
    """

    embed: tuple[str, ...] = ("fsdp", "stage")
    wide: tuple[str, ...] = ("tensor",)
    latent: tuple[str, ...] = ()
    expert: tuple[str, ...] = ("expert",)
    expert_width: tuple[str, ...] = ("tensor",)
    layers: tuple[str, ...] = ("stage",)


ZERO = AxisRules(embed=("fsdp", "stage", "data"), wide=("tensor", "expert"), latent=("expert",))
"""Of optimizer state: divided over replicas of the parameters too, over which nothing is multiplied (ZeRO-1)."""

WITHIN_A_STAGE = AxisRules(embed=("fsdp",), layers=())
"""Of parameters that a pipeline stage works with: all of its own layers and of what every stage has."""

# The last dimensions of a leaf, by the end of its path; stacked layers have one more in front.
_DIMENSIONS: dict[tuple[str, ...], tuple[str | None, ...]] = {
    ("embedding", "weight"): ("wide", "embed"),
    ("head", "weight"): ("wide", "embed"),
    ("q_a", "weight"): ("latent", "embed"),
    # Latents are narrow: FSDP divides that side of their up-projections.
    ("q_b", "weight"): ("wide", None, "embed"),
    ("kv_a", "weight"): ("latent", "embed"),
    ("kv_b", "weight"): ("wide", None, "embed"),
    ("o", "weight"): ("embed", "wide", None),
    ("gate_up", "weight"): (None, "wide", "embed"),
    ("down", "weight"): ("embed", "wide"),
    ("router", "weight"): ("latent", "embed"),
    ("projection", "weight"): ("latent", "embed"),
    ("experts", "gate_up"): ("expert", None, "expert_width", "embed"),
    ("experts", "down"): ("expert", "embed", "expert_width"),
}
_STACKED = ("dense_blocks", "moe_blocks")


def rules_over_stages(layers: Sequence[int], zero: bool = False) -> AxisRules:
    """The rules where pipeline stages hold so many of the stacked MoE layers each (report section 3.2.1).

    Equal parts of a stack are what the stages hold only where they hold equally many; elsewhere every matrix is cut
    over the stages by its width.

    Args:
      layers: one number a stage, or none.
      zero: of optimizer state that is divided over replicas, instead of parameters.
    """
    rules = ZERO if zero else AxisRules()
    return rules if len(set(layers)) <= 1 else dataclasses.replace(rules, layers=())


def parameter_specs(tree: Tree, mesh: Mesh, rules: AxisRules | None = None) -> Tree:
    """A PartitionSpec for every leaf: a tree of parameters, or a whole train state.

    Args:
      tree: arrays or `jax.ShapeDtypeStruct`s, their paths as in ARCHITECTURE.md.
    """
    rules = rules or AxisRules()

    def spec(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        return _spec(_names(path), leaf.shape, mesh, rules)

    return jax.tree_util.tree_map_with_path(spec, tree)


def shardings(tree: Tree, mesh: Mesh, rules: AxisRules | None = None) -> Tree:
    """The same as NamedShardings."""
    specs = parameter_specs(tree, mesh, rules)
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)
    )


def batch_spec(leading: int = 0) -> PartitionSpec:
    """Of a batch [..., B, T] with so many dimensions before B."""
    return PartitionSpec(*[None] * leading, BATCH_AXES)


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """Names along a path, without the attribute in which a Variable keeps its array."""
    names = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path]
    return tuple(name for name in names if name != "value")


def _spec(names: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh, rules: AxisRules) -> PartitionSpec:
    dimensions = _DIMENSIONS.get(names[-2:])
    if dimensions is None or len(shape) < len(dimensions):
        return PartitionSpec()
    stacked = len(shape) > len(dimensions) and any(name in _STACKED for name in names)
    logical = (("layers",) if stacked else (None,)) * (len(shape) - len(dimensions)) + dimensions
    used: set[str] = set()
    parts = []
    for name, size in zip(logical, shape, strict=True):
        axes: list[str] = []
        for axis in getattr(rules, name) if name else ():
            ways = math.prod(mesh.shape[other] for other in [*axes, axis])
            if axis not in used and mesh.shape[axis] > 1 and size % ways == 0:
                axes.append(axis)
        used.update(axes)
        parts.append(None if not axes else axes[0] if len(axes) == 1 else tuple(axes))
    return PartitionSpec(*parts)
