"""Reads from a block of the model what it keeps for its backward pass and which weights it all-gathers.

A block is traced abstractly, with the shapes that one rank computes: nothing is compiled and no array is made.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

import pallas_kernels
from dsv3_jax.config import ModelConfig
from dsv3_jax.modules.attention_core import CoreAttention
from dsv3_jax.modules.block import Block, BlockInputs
from dsv3_jax.modules.devices import ExpertShapes, OneDevice
from dsv3_jax.modules.embedding import Head
from dsv3_jax.modules.multi_token import MultiTokenModule
from dsv3_jax.modules.parameter import ParameterShape
from dsv3_jax.modules.rematerialisation import rematerialise
from dsv3_jax.modules.rope import make_rotation
from dsv3_jax.pipeline.residuals import ArrayType, TwoPasses
from dsv3_jax.planning.attention_form import AttentionForm, attend_as_kernel
from dsv3_jax.planning.materialised import materialised_bytes
from dsv3_jax.precision import AttendedRows, ExpertNetworks, Precision, PreparedRows, saved_bytes
from dsv3_jax.sharding.expert_parallel import recomputed

BlockKind = Literal["dense", "moe", "join", "head"]
LAYER_INPUT = "layer input"


@dataclasses.dataclass(frozen=True)
class BlockShape:
    """The shape of a block that is given one sequence.

    Attributes:
      kind: a dense or MoE layer; "join" is what an MTP module does before its MoE layer, "head" the output head.
      tensor: ranks of the tensor axis, of which one is traced.
      length: tokens of the sequence.
      on_mesh: whether the routed experts exchange tokens with other devices.
      attention: what computes attention.
      keeps_core: whether kernels keep their output once, for themselves and for the next linear map.
    """

    model: ModelConfig
    kind: BlockKind
    precision: Precision
    tensor: int
    length: int
    on_mesh: bool
    attention: AttentionForm
    keeps_core: bool


@dataclasses.dataclass(frozen=True)
class Gathered:
    """A weight of one rank of the tensor axis that FSDP all-gathers for a product, and the dtype in which it does."""

    shape: ParameterShape
    dtype: jnp.dtype


@dataclasses.dataclass(frozen=True)
class TracedBlock:
    """What a block needs while its backward pass runs.

    Attributes:
      inputs: bytes of its inputs.
      working: bytes of activations, inputs included, that the backward pass reads once the forward pass was recomputed.
      gathered: the weights of its products.
    """

    inputs: float
    working: float
    gathered: tuple[Gathered, ...]


@functools.lru_cache(maxsize=512)
def traced_block(shape: BlockShape) -> TracedBlock:
    """Returns what a block needs while its backward pass runs."""
    block = _AbstractBlock.of(shape)
    working = materialised_bytes(block.forward("none"), block.params, block.hidden, block.rest, block.inputs)
    return TracedBlock(block.input_bytes, working, tuple(block.gathered))


@functools.lru_cache(maxsize=512)
def kept_by_block(shape: BlockShape, policy: str) -> dict[str, float]:
    """Returns the bytes that a block keeps for its backward pass in a loop over layers, by what they are.

    Args:
      policy: a rematerialisation policy (`dsv3_jax.modules.rematerialisation`).
    """
    block = _AbstractBlock.of(shape)
    saved = saved_bytes(block.forward(policy), (block.params, block.hidden), block.rest, block.inputs)
    return {LAYER_INPUT: block.input_bytes} | {f"kept in {dtype}": float(count) for dtype, count in saved.items()}


@functools.lru_cache(maxsize=512)
def residuals_of_block(shape: BlockShape, policy: str) -> tuple[ArrayType, ...]:
    """Returns shape and dtype of what a pipeline stage keeps of a dense or MoE layer for its backward pass."""
    block = _AbstractBlock.of(shape)
    forward = block.forward(policy)

    def layer(params: nnx.State, others: tuple[nnx.State, BlockInputs], h: Array) -> tuple[Any, None]:
        out, statistics = forward((params, (h,)), *others)
        routing = statistics.routing
        return (out, None if routing is None else routing.sequence_balance), None

    return TwoPasses.of(layer, block.params, (block.rest, block.inputs), block.hidden[0]).types


@dataclasses.dataclass(frozen=True, eq=False)
class _OneRank(OneDevice):
    """One rank of a mesh, without the others. It records the weights that it would all-gather."""

    on_mesh: bool
    attention: AttentionForm
    keeps_core: bool
    gathered: list[Gathered]

    def multiply(
        self,
        product: Callable[[Any, Array], Array],
        x: Float[Array, "..."] | PreparedRows,
        weight: Float[Array, "..."],
        shape: ParameterShape,
        *,
        batch_axes: int,
        in_axes: int,
        gather_dtype: jnp.dtype,
    ) -> Float[Array, "..."]:
        """Returns product(x, weight)."""
        self.gathered.append(Gathered(shape, gather_dtype))
        return product(x, weight)

    def attend(
        self,
        attention: CoreAttention,
        queries: Float[Array, "B T H qk"],
        keys: Float[Array, "B T H c"],
        values: Float[Array, "B T H v"],
        shared_keys: Float[Array, "B T r"],
        segment_ids: Int[Array, "B T"] | None,
    ) -> Float[Array, "B T H v"] | AttendedRows:
        """Returns plain attention, or what stands for a kernel that this machine cannot trace."""
        if self.attention == "scan":
            return super().attend(attention, queries, keys, values, shared_keys, segment_ids)
        return attend_as_kernel(
            self.attention, attention.kept if self.keeps_core else None, queries, keys, values, shared_keys
        )

    def apply_experts(
        self,
        u: Float[Array, "*batch d"],
        gates: pallas_kernels.Gates,
        gate_up: Float[Array, "E 2 I d"],
        down: Float[Array, "E d I"],
        networks: ExpertNetworks,
        shapes: ExpertShapes,
    ) -> Float[Array, "*batch d"]:
        """Returns what one device computes; on a mesh only its arguments are kept, as by `ExpertExchange`."""
        dtype = shapes.gather_dtype or gate_up.dtype
        self.gathered.extend((Gathered(shapes.gate_up, dtype), Gathered(shapes.down, dtype)))
        if not self.on_mesh:
            return super().apply_experts(u, gates, gate_up, down, networks, shapes)

        def apply(u: Array, *others: Array) -> Array:
            return u  # stands for the exchange, of which nothing is kept

        return recomputed(apply, u, gates.expert_index, gates.gate, gate_up, down)


@dataclasses.dataclass(frozen=True)
class _AbstractBlock:
    """A block with shapes for arrays: its structure, parameters, other variables, and arguments."""

    kind: BlockKind
    graph: Any
    params: nnx.State
    rest: nnx.State
    hidden: tuple[jax.ShapeDtypeStruct, ...]
    inputs: BlockInputs
    gathered: list[Gathered]

    @classmethod
    def of(cls, shape: BlockShape) -> _AbstractBlock:
        model, gathered = _of_tensor_rank(shape.model, shape.tensor), []
        devices = _OneRank(shape.on_mesh, shape.attention, shape.keeps_core, gathered)
        make: dict[str, Any] = {"dtype": jnp.dtype(jnp.float32), "precision": shape.precision, "devices": devices}

        def module() -> nnx.Module:
            if shape.kind == "head":
                return Head(model, rngs=nnx.Rngs(0), **make)
            if shape.kind == "join":
                return MultiTokenModule(model, rngs=nnx.Rngs(0), **make)
            return Block(model, moe=shape.kind == "moe", rngs=nnx.Rngs(0), **make)

        graph, params, rest = nnx.split(nnx.eval_shape(module), nnx.Param, ...)
        tokens = (1, shape.length)
        positions = jax.ShapeDtypeStruct(tokens, jnp.int32)
        hidden = jax.ShapeDtypeStruct((*tokens, model.hidden_size), shape.precision.dtype)
        inputs = BlockInputs(
            rotation=jax.eval_shape(functools.partial(make_rotation, model), positions),
            token_mask=jax.ShapeDtypeStruct(tokens, jnp.bool_),  # pyright: ignore[reportArgumentType]
            attention="scan",  # kernels are replaced by `_OneRank.attend`
        )
        return cls(shape.kind, graph, params, rest, (hidden,) * (2 if shape.kind == "join" else 1), inputs, gathered)

    def forward(self, policy: str) -> Callable[..., Any]:
        """Returns the block as a function of ((params, hidden states), other variables, inputs) under a policy."""

        def call(params: nnx.State, hidden: tuple[Array, ...], rest: nnx.State, inputs: BlockInputs) -> Any:
            module: Any = nnx.merge(self.graph, params, rest)
            if self.kind in ("join", "head"):
                return (module.join if self.kind == "join" else module)(*hidden)
            return module(*hidden, inputs)

        rematerialised = rematerialise(call, policy)
        return lambda first, rest, inputs: rematerialised(*first, rest, inputs)

    @property
    def input_bytes(self) -> float:
        """Bytes of its hidden states."""
        return float(sum(leaf.size * leaf.dtype.itemsize for leaf in self.hidden))


def _of_tensor_rank(model: ModelConfig, tensor: int) -> ModelConfig:
    """Returns the model with the heads and widths of one rank of the tensor axis, where these can be divided."""
    sizes = {
        name: getattr(model, name) // tensor
        for name in ("num_attention_heads", "intermediate_size", "moe_intermediate_size", "vocab_size")
        if getattr(model, name) % tensor == 0
    }
    return model.replace(**sizes) if tensor > 1 else model
