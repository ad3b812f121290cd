"""The published name of every tensor, and the part of our parameters that the tensor fills.

Import, export and the account read this one table. A `PublishedTensor` names the parameter that it belongs to and an
index into that parameter's leading axes (layer of a stack, expert, gate or up). The parameter at that index has the
published tensor's elements in the published order. Only the shape differs, so that a reshape converts one to the other,
and a block of 128 x 128 weights with one FP8 scale is the same block on both sides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from dsv3_jax.config import ModelConfig
from pallas_kernels import TILE

EMBEDDING, HEAD = "embedding.weight", "head.weight"
SCALE_SUFFIX = "_scale_inv"
BLOCK = TILE  # rows and columns of a block of weights that has one FP8 scale (report section 3.3.2)


@dataclasses.dataclass(frozen=True, slots=True)
class PublishedTensor:
    """One tensor of a published checkpoint.

    Attributes:
      name: its published name.
      shape: its published shape; [out, in] for matrices.
      path: dotted name of our parameter.
      index: index into the parameter's leading axes.
      tail: shape of the parameter at `index`; it has the elements of `shape` in the same order.
      quantised: FP8 checkpoints store it as e4m3 values with scales (section 3.3.1 says which tensors are not).
      always_float32: it is stored in float32 whatever the dtype of the others.
      rotary_head: rows per head, of which RoPE rotates the last `qk_rope_head_dim`; 0 for tensors without RoPE.
      copy: it is a second copy of a parameter that another tensor fills (MTP stores embedding and head again).
    """

    name: str
    shape: tuple[int, ...]
    path: str
    index: tuple[int, ...] = ()
    tail: tuple[int, ...] = ()
    quantised: bool = False
    always_float32: bool = False
    rotary_head: int = 0
    copy: bool = False

    @property
    def scale_shape(self) -> tuple[int, int]:
        """Shape of the tensor of scales: one scale per block; an incomplete last block has a scale too."""
        rows, columns = self.shape
        return -(-rows // BLOCK), -(-columns // BLOCK)


def published_tensors(config: ModelConfig) -> Iterator[PublishedTensor]:
    """Yields every published tensor of a model in the order of the layers, without the tensors of FP8 scales."""
    d, vocabulary = config.hidden_size, config.vocab_size
    yield _tensor("model.embed_tokens.weight", EMBEDDING, (vocabulary, d))
    dense = config.num_dense_layers
    for layer in range(config.num_hidden_layers):
        path = "dense_blocks" if layer < dense else "moe_blocks"
        index = layer if layer < dense else layer - dense
        yield from _block(config, f"model.layers.{layer}", path, (index,), moe=layer >= dense)
    yield _tensor("model.norm.weight", "final_norm.weight", (d,))
    yield _tensor("lm_head.weight", HEAD, (vocabulary, d))
    for depth in range(config.num_nextn_predict_layers):
        yield from _mtp_module(config, depth)


def is_mtp(config: ModelConfig, name: str) -> bool:
    """Tells whether a published name belongs to an MTP module: their layer numbers follow those of the main model."""
    prefix, _, rest = name.partition("model.layers.")
    layer = rest.partition(".")[0]
    return not prefix and layer.isdecimal() and len(layer) < 10 and int(layer) >= config.num_hidden_layers


def holds_no_weights(name: str) -> bool:
    """Tells whether a tensor holds RoPE frequencies, which some checkpoints store though config.json gives them."""
    return name.endswith(".rotary_emb.inv_freq")


def _mtp_module(config: ModelConfig, depth: int) -> Iterator[PublishedTensor]:
    d, vocabulary = config.hidden_size, config.vocab_size
    name, path = f"model.layers.{config.num_hidden_layers + depth}", f"mtp.{depth}"
    yield _tensor(f"{name}.embed_tokens.weight", EMBEDDING, (vocabulary, d), copy=True)
    yield _tensor(f"{name}.enorm.weight", f"{path}.embedding_norm.weight", (d,))
    yield _tensor(f"{name}.hnorm.weight", f"{path}.hidden_norm.weight", (d,))
    yield _tensor(f"{name}.eh_proj.weight", f"{path}.projection.weight", (d, 2 * d))
    yield from _block(config, name, f"{path}.block", (), moe=True)
    yield _tensor(f"{name}.shared_head.norm.weight", f"{path}.output_norm.weight", (d,))
    yield _tensor(f"{name}.shared_head.head.weight", HEAD, (vocabulary, d), copy=True)


def _block(
    config: ModelConfig, name: str, path: str, index: tuple[int, ...], *, moe: bool
) -> Iterator[PublishedTensor]:
    d = config.hidden_size
    yield _tensor(f"{name}.input_layernorm.weight", f"{path}.attention_norm.weight", (d,), index)
    yield from _attention(config, f"{name}.self_attn", f"{path}.attention", index)
    yield _tensor(f"{name}.post_attention_layernorm.weight", f"{path}.feed_forward_norm.weight", (d,), index)
    if moe:
        yield from _mixture_of_experts(config, f"{name}.mlp", f"{path}.feed_forward", index)
    else:
        yield from _feed_forward(f"{name}.mlp", f"{path}.feed_forward", index, d, config.intermediate_size)


def _attention(config: ModelConfig, name: str, path: str, index: tuple[int, ...]) -> Iterator[PublishedTensor]:
    d, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    query_rank = config.q_lora_rank
    query_width, key_value = config.qk_head_dim, config.qk_nope_head_dim + config.v_head_dim
    if query_rank is not None:
        yield _matrix(f"{name}.q_a_proj", f"{path}.q_a.weight", (query_rank, d), index)
        yield _tensor(f"{name}.q_a_layernorm.weight", f"{path}.q_a_norm.weight", (query_rank,), index)
    yield _matrix(
        f"{name}.q_proj" if query_rank is None else f"{name}.q_b_proj",
        f"{path}.q_b.weight",
        (heads * query_width, query_rank or d),
        index,
        (heads, query_width, query_rank or d),
        rotary_head=query_width,
    )
    latent_and_key = rank + config.qk_rope_head_dim
    yield _matrix(
        f"{name}.kv_a_proj_with_mqa",
        f"{path}.kv_a.weight",
        (latent_and_key, d),
        index,
        rotary_head=latent_and_key,
    )
    yield _tensor(f"{name}.kv_a_layernorm.weight", f"{path}.kv_a_norm.weight", (rank,), index)
    yield _matrix(
        f"{name}.kv_b_proj",
        f"{path}.kv_b.weight",
        (heads * key_value, rank),
        index,
        (heads, key_value, rank),
    )
    value = config.v_head_dim
    yield _matrix(f"{name}.o_proj", f"{path}.o.weight", (d, heads * value), index, (d, heads, value))


def _mixture_of_experts(config: ModelConfig, name: str, path: str, index: tuple[int, ...]) -> Iterator[PublishedTensor]:
    d, width, experts = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    yield _tensor(f"{name}.gate.weight", f"{path}.router.weight", (experts, d), index)
    if config.has_router_bias:
        bias = f"{name}.gate.e_score_correction_bias"
        yield _tensor(bias, f"{path}.router.bias", (experts,), index, always_float32=True)
    for expert in range(experts):
        one, at = f"{name}.experts.{expert}", (*index, expert)
        yield _matrix(f"{one}.gate_proj", f"{path}.experts.gate_up", (width, d), (*at, 0))
        yield _matrix(f"{one}.up_proj", f"{path}.experts.gate_up", (width, d), (*at, 1))
        yield _matrix(f"{one}.down_proj", f"{path}.experts.down", (d, width), at)
    if config.n_shared_experts:
        yield from _feed_forward(f"{name}.shared_experts", f"{path}.shared", index, d, config.n_shared_experts * width)


def _feed_forward(name: str, path: str, index: tuple[int, ...], d: int, width: int) -> Iterator[PublishedTensor]:
    yield _matrix(f"{name}.gate_proj", f"{path}.gate_up.weight", (width, d), (*index, 0))
    yield _matrix(f"{name}.up_proj", f"{path}.gate_up.weight", (width, d), (*index, 1))
    yield _matrix(f"{name}.down_proj", f"{path}.down.weight", (d, width), index)


def _tensor(
    name: str,
    path: str,
    shape: tuple[int, ...],
    index: tuple[int, ...] = (),
    *,
    always_float32: bool = False,
    copy: bool = False,
) -> PublishedTensor:
    return PublishedTensor(name, shape, path, index, shape, always_float32=always_float32, copy=copy)


def _matrix(
    name: str,
    path: str,
    shape: tuple[int, int],
    index: tuple[int, ...],
    tail: tuple[int, ...] | None = None,
    *,
    rotary_head: int = 0,
) -> PublishedTensor:
    """Returns the weight of a linear map, which FP8 checkpoints quantise."""
    return PublishedTensor(f"{name}.weight", shape, path, index, tail or shape, quantised=True, rotary_head=rotary_head)
