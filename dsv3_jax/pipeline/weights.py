"""Moves weights from the training state to pipeline stages, and gradients back (report section 3.2.1).

The state shards a stack of MoE layers over the stage axis: by layers if all stages hold equally many, else along the
hidden size. All other weights are sharded along the hidden size too. A rank's program begins with an exchange, in which
each rank sends every stage its shards of that stage's layers. It ends with the opposite exchange of gradients. So no
rank ever holds all layers.

All stages compute with the vocabulary's weights together: each looks up its columns of the embedding, as the state
shards them, and multiplies by its rows of the output head. The blocks of the MTP modules are gathered by all ranks, but
kept by the last stage alone (`mtp_slots`). Every stage keeps all of the other weights.

Weights are exchanged and kept for the step in the dtype in which products multiply by them, FP8 with scales included,
so that every product has the bits that it would have with masters.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array

from dsv3_jax.model import DeepSeekV3
from dsv3_jax.modules.embedding import Embedding, Head
from dsv3_jax.modules.linear import Linear
from dsv3_jax.modules.moe import Experts
from dsv3_jax.pipeline.executor import AXIS
from dsv3_jax.precision.fp8_weight import Fp8Weight
from dsv3_jax.sharding.fp8_shards import quantized_shard, sent_as_bits
from dsv3_jax.sharding.ranks import axes_of, without_axes
from dsv3_jax.sharding.rules import BATCH_AXES, CONTEXT, AxisRules, parameter_specs, rules_over_stages
from pallas_kernels import TILE

Path = tuple[str | int, ...]
Tree = Any
"""A pytree of arrays, of their shapes, or of `StageWeightLayout`s."""

Share = Literal["layers", "columns", "rows", "last", "whole"]
"""What a stage holds of a weight while a step runs: its layers, its columns or rows, all if it is the last, or all."""

_SHARES: dict[str, Share] = {"moe_blocks": "layers", "embedding": "columns", "head": "rows"}
_GATHERED: tuple[Share, ...] = ("last", "whole")

_TENSOR_ONLY = AxisRules(embed=(), latent=(), expert=(), layers=())


def share_of(path: Path) -> Share:
    """Returns what a stage holds of the weight with this path in the tree of parameters."""
    return "last" if is_of_mtp_block(path) else _SHARES.get(str(path[0]), "whole")


def is_of_mtp_block(path: tuple[Any, ...]) -> bool:
    """Whether the weight with this path is one of an MTP module's block."""
    return path[0] == "mtp" and path[2] == "block"


@dataclasses.dataclass(frozen=True)
class Format:
    """The dtype in which stages keep a weight for the step: the one in which products multiply by it.

    Attributes:
      dtype: float8_e4m3fn is with a scale for every block of 128 x 128.
      stacked, inputs: of the axes [*stacked, *out, *in] of the weight, how many are stacked, layers included, and how
        many are inputs. Only FP8 needs them.
    """

    dtype: jnp.dtype
    stacked: int = 0
    inputs: int = 0

    @property
    def bytes(self) -> float:
        """Bytes per element, with an element's part of its block's scale."""
        return self.dtype.itemsize + (4 / TILE**2 if self.in_fp8 else 0)

    @property
    def in_fp8(self) -> bool:
        """Whether the dtype is float8_e4m3fn."""
        return self.dtype == jnp.float8_e4m3fn


def working_formats(model: DeepSeekV3, mesh: Mesh | AbstractMesh) -> dict[Path, Format]:
    """Returns the format of every weight that stages keep in another dtype than its master, by its path.

    Where FSDP shards the weights of a stage there are none, because it sums gradients in the dtype of a shard. Where a
    tensor axis does, none are in FP8, because ranks would share blocks.
    """
    found: dict[Any, Format] = {}
    if mesh.shape["fsdp"] > 1:
        return found
    for path, module in nnx.iter_modules(model):
        layers = int(path[:1] in (("moe_blocks",), ("dense_blocks",)))
        if isinstance(module, Embedding | Head):
            found[*path, "weight"] = Format(module.precision.dtype)
        elif isinstance(module, Linear) and (dtype := module.precision.gather_dtype):
            found[*path, "weight"] = Format(dtype, layers, module.in_axes)
        elif isinstance(module, Experts) and (dtype := module.precision.gather_dtype):
            found |= {(*path, name): Format(dtype, layers + 1, 1) for name in ("gate_up", "down")}
    return {path: form for path, form in found.items() if not (form.in_fp8 and mesh.shape["tensor"] > 1)}


@dataclasses.dataclass(frozen=True)
class StageWeightLayout:
    """Where one weight is, in the state and while a stage works with it.

    Attributes:
      spec: the sharding in the state, along the axes that are manual in a rank's program.
      stage_dimension: the dimension that is sharded over the stage axis; None if every rank has all of it.
      replicas: batch axes whose ranks have the same shard.
      automatic: the sharding that the compiler keeps up inside a rank's program, along the axes it is left.
      share: what a stage holds of it.
      parts: how many layers or rows each stage holds; empty for other shares.
      format: the format in which a stage keeps it; None for the master's own dtype.
    """

    spec: PartitionSpec
    stage_dimension: int | None
    replicas: tuple[str, ...]
    automatic: PartitionSpec
    share: Share
    parts: tuple[int, ...]
    format: Format | None = None

    @classmethod
    def replicated_layers(cls, layers: tuple[int, ...]) -> StageWeightLayout:
        """Returns the layout of a stack of layers that every rank has whole in the state."""
        return cls(PartitionSpec(), None, (), PartitionSpec(), "layers", layers)


def rows_of_stages(vocabulary: int, mesh: Mesh | AbstractMesh) -> tuple[int, ...]:
    """Returns how many rows of the output head each stage holds: equally many, which tensor ranks can divide.

    The last stages have fewer where the vocabulary is no multiple.
    """
    tensor = mesh.shape["tensor"]
    most = -(-vocabulary // (mesh.shape[AXIS] * tensor)) * tensor
    return tuple(min(most, max(vocabulary - stage * most, 0)) for stage in range(mesh.shape[AXIS]))


def manual_axes(mesh: Mesh) -> set[str]:
    """Returns the axes along which a rank's program has its own shards; a tensor axis is left to the compiler."""
    return {AXIS, CONTEXT, *BATCH_AXES} | ({"tensor"} if mesh.shape["tensor"] == 1 else set())


def weight_layouts(
    params: Tree, mesh: Mesh, layers: Sequence[int], formats: Mapping[Path, Format] = MappingProxyType({})
) -> Tree:
    """Returns a `StageWeightLayout` for every leaf.

    Args:
      params: all parameters of the model, as arrays or as shapes.
      layers: how many MoE layers each stage holds.
      formats: those of `working_formats`.
    """

    def layout(path: tuple[Any, ...], spec: PartitionSpec, automatic: PartitionSpec, leaf: Any) -> StageWeightLayout:
        spec = without_axes(spec, set(mesh.shape) - manual_axes(mesh))
        axes = [axes_of(entry) for entry in spec]
        stage_dimension = next((dimension for dimension, names in enumerate(axes) if AXIS in names), None)
        sharded = {name for names in axes for name in names}
        replicas = tuple(axis for axis in BATCH_AXES if axis not in sharded)
        names = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        share = share_of(names)
        parts = ()
        if share in ("layers", "rows"):
            parts = tuple(layers) if share == "layers" else rows_of_stages(leaf.shape[0], mesh)
        return StageWeightLayout(spec, stage_dimension, replicas, automatic, share, parts, formats.get(names))

    specs = parameter_specs(params, mesh, rules_over_stages(layers))
    automatic = parameter_specs(params, mesh, _TENSOR_ONLY)
    is_spec = functools.partial(_is_a, PartitionSpec)
    return jax.tree_util.tree_map_with_path(layout, specs, automatic, params, is_leaf=is_spec)


def specs_of(layouts: Tree) -> Tree:
    """Returns the `spec` of every layout."""
    return jax.tree.map(lambda layout: layout.spec, layouts)


def keep_automatic(tree: Tree, layouts: Tree, mesh: Mesh) -> Tree:
    """Returns the arrays, sharded by the compiler as their layouts say. It works inside a rank's program."""
    if mesh.shape["tensor"] == 1:
        return tree
    return jax.tree.map(lambda leaf, layout: lax.with_sharding_constraint(leaf, layout.automatic), tree, layouts)


def to_stage(leaf: Array, layout: StageWeightLayout) -> Array | Fp8Weight:
    """Returns what a stage holds of a weight, with as many layers or rows as the stage that has most of them.

    All ranks get what the last stage holds alone.

    Args:
      leaf: this rank's shard.
    """
    form, dimension = layout.format, layout.stage_dimension
    if form is None or not form.in_fp8:
        return _to_stage(leaf if form is None else leaf.astype(form.dtype), layout)
    by_layers = layout.share == "layers"
    sharded = None if by_layers and dimension == 0 else dimension
    part = quantized_shard(leaf, sharded, AXIS, in_axes=form.inputs, stacked=form.stacked)
    scales = part.scales
    if by_layers and dimension != 0:
        scales = _to_stage(scales, StageWeightLayout.replicated_layers(layout.parts))
    values = sent_as_bits(lambda leaf: _to_stage(leaf, layout), part.values)
    return Fp8Weight(values, scales, columns=math.prod(values.shape[values.ndim - form.inputs :]))


def _to_stage(leaf: Array, layout: StageWeightLayout) -> Array:
    dimension, parts = layout.stage_dimension, layout.parts
    if layout.share == "columns" or (layout.share == "layers" and dimension == 0):
        return leaf
    if layout.share in _GATHERED:
        return leaf if dimension is None else lax.all_gather(leaf, AXIS, axis=dimension, tiled=True)
    leaf = pad_stages(leaf, parts)
    if dimension is not None:
        return lax.all_to_all(leaf, AXIS, split_axis=0, concat_axis=dimension, tiled=True)
    return lax.dynamic_slice_in_dim(leaf, lax.axis_index(AXIS) * max(parts), max(parts))


def from_stage(gradient: Array, layout: StageWeightLayout) -> Array:
    """Returns this rank's shard of the gradient, summed over those that hold the same: the inverse of `to_stage`."""
    dimension, replicas = layout.stage_dimension, layout.replicas
    if layout.share in ("columns", *_GATHERED):
        if dimension is None:
            replicas = (AXIS, *replicas)
        elif layout.share in _GATHERED:
            gradient = lax.psum_scatter(gradient, AXIS, scatter_dimension=dimension, tiled=True)
    elif dimension is None:
        gradient = unpad_stages(lax.all_gather(gradient, AXIS, axis=0, tiled=True), layout.parts)
    elif layout.share == "rows" or dimension != 0:
        gradient = lax.all_to_all(gradient, AXIS, split_axis=dimension, concat_axis=0, tiled=True)
        gradient = unpad_stages(gradient, layout.parts)
    return lax.psum(gradient, replicas)


def zero_gradients(weights: Tree, masters: Tree) -> Tree:
    """Returns zeros of the shapes of the stage's weights and the dtypes of their masters."""

    def one(weight: Array | Fp8Weight, master: Array) -> Array:
        return jnp.zeros(weight.shape, master.dtype)

    return jax.tree.map(one, weights, masters, is_leaf=functools.partial(_is_a, Fp8Weight))


def with_gradients(weights: Tree) -> Tree:
    """Returns the weights in a form whose gradients are at least float32, as those of masters are.

    Those in FP8 have an array that gets their gradient (`Fp8Weight.gradient`). Others are converted to float32, which
    the compiler leaves out before a product that rounds them again.
    """

    def one(weight: Array | Fp8Weight) -> Array | Fp8Weight:
        if not isinstance(weight, Fp8Weight):
            return weight.astype(jnp.promote_types(weight.dtype, jnp.float32))
        return dataclasses.replace(weight, gradient=jnp.zeros(weight.values.shape, jnp.float32))

    return jax.tree.map(one, weights, is_leaf=functools.partial(_is_a, Fp8Weight))


def gradients_of(weights: Tree) -> Tree:
    """Returns the gradients as arrays, from gradients by the weights of `with_gradients`."""

    def one(weight: Array | Fp8Weight) -> Array | None:
        return weight.gradient if isinstance(weight, Fp8Weight) else weight

    return jax.tree.map(one, weights, is_leaf=functools.partial(_is_a, Fp8Weight))


def _is_a(kind: type, leaf: Any) -> bool:
    return isinstance(leaf, kind)


def with_opposite_stage(leaf: Array) -> Array:
    """Returns the slots of a rank's own stage, followed by those of the opposite rank's stage."""
    return jnp.concatenate([leaf, lax.ppermute(leaf, AXIS, _opposite())])


def add_opposite_stage(gradient: Array) -> Array:
    """Returns the sum over both ranks that hold a stage: the inverse of `with_opposite_stage`."""
    slots = gradient.shape[0] // 2
    return gradient[:slots] + lax.ppermute(gradient[slots:], AXIS, _opposite())


def _opposite() -> list[tuple[int, int]]:
    ranks = lax.axis_size(AXIS)
    return [(rank, ranks - 1 - rank) for rank in range(ranks)]


def pad_stages(leaf: Array, layers: Sequence[int]) -> Array:
    """Returns a stack [L, ...] with the layers of every stage padded to as many slots as the largest stage has layers.

    It takes slices, because the compiler cannot shard a gather of the same rows on a mesh of several axes.
    """
    slots, starts = max(layers), np.cumsum((0, *layers))
    if min(layers) == slots:
        return leaf
    rest = [(0, 0)] * (leaf.ndim - 1)
    parts = (leaf[start : start + n] for start, n in zip(starts, layers, strict=False))
    return jnp.concatenate([jnp.pad(part, ((0, slots - part.shape[0]), *rest)) for part in parts])


def unpad_stages(leaf: Array, layers: Sequence[int]) -> Array:
    """Returns the stack [L, ...] without the padding of `pad_stages`."""
    slots = max(layers)
    return jnp.concatenate([leaf[stage * slots : stage * slots + n] for stage, n in enumerate(layers)])
