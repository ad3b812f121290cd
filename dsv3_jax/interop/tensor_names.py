"""Published tensor names against the parameter tree of ARCHITECTURE.md.

One declaration serves import, export and the account. Each published tensor is a `Slot`: the parameter it belongs to
and its place in that parameter's leading axes (layer of a stack, expert, gate or up). What is left of the parameter
there has the published tensor's elements in the published order, so a reshape is all that lies between them, and the
128 x 128 blocks of FP8 scales mean the same on both sides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from dsv3_jax.config import ModelConfig

EMBEDDING, HEAD = "embedding.weight", "head.weight"
SCALE_SUFFIX = "_scale_inv"
BLOCK = 128  # side of the square of weights that shares a scale (report section 3.3.2)


@dataclasses.dataclass(frozen=True, slots=True)
class Slot:
    """One published tensor.

    Attributes:
      name: as published.
      shape: as published, [out, in] for matrices.
      path: dotted name of our parameter.
      index: place in the parameter's leading axes.
      tail: shape of the parameter there; the same elements in the same order as `shape`.
      quantised: stored as e4m3 with scales in FP8 checkpoints (report section 3.3.1 keeps the rest as it is).
      always_float32: stored in float32 whatever the rest is in.
      rotary_head: width of a head whose last `qk_rope_head_dim` rows RoPE turns; 0 for other tensors.
      copy: a second copy of a parameter that another slot fills (MTP repeats embedding and head).
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
        """Shape of the tensor of scales: a scale a block, ragged last blocks counted whole."""
        rows, columns = self.shape
        return -(-rows // BLOCK), -(-columns // BLOCK)


def slots(config: ModelConfig) -> Iterator[Slot]:
    """Every published tensor of a model, in order of layers; scale tensors are not listed apart."""
    d, vocabulary = config.hidden_size, config.vocab_size
    yield _slot("model.embed_tokens.weight", EMBEDDING, (vocabulary, d))
    dense = config.num_dense_layers
    for layer in range(config.num_hidden_layers):
        path = "dense_blocks" if layer < dense else "moe_blocks"
        place = layer if layer < dense else layer - dense
        yield from _block(config, f"model.layers.{layer}", path, (place,), moe=layer >= dense)
    yield _slot("model.norm.weight", "final_norm.weight", (d,))
    yield _slot("lm_head.weight", HEAD, (vocabulary, d))
    for depth in range(config.num_nextn_predict_layers):
        yield from _mtp_module(config, depth)


def is_mtp(config: ModelConfig, name: str) -> bool:
    """Whether a published name belongs to an MTP module, whose layer numbers follow the main model's."""
    prefix, _, rest = name.partition("model.layers.")
    layer = rest.partition(".")[0]
    return not prefix and layer.isdecimal() and len(layer) < 10 and int(layer) >= config.num_hidden_layers


def carries_nothing(name: str) -> bool:
    """Tensors some uploads contain that hold no weights: RoPE frequencies, recomputed from the configuration."""
    return name.endswith(".rotary_emb.inv_freq")


def _mtp_module(config: ModelConfig, depth: int) -> Iterator[Slot]:
    d, vocabulary = config.hidden_size, config.vocab_size
    name, path = f"model.layers.{config.num_hidden_layers + depth}", f"mtp.{depth}"
    yield _slot(f"{name}.embed_tokens.weight", EMBEDDING, (vocabulary, d), copy=True)
    yield _slot(f"{name}.enorm.weight", f"{path}.embedding_norm.weight", (d,))
    yield _slot(f"{name}.hnorm.weight", f"{path}.hidden_norm.weight", (d,))
    yield _slot(f"{name}.eh_proj.weight", f"{path}.projection.weight", (d, 2 * d))
    yield from _block(config, name, f"{path}.block", (), moe=True)
    yield _slot(f"{name}.shared_head.norm.weight", f"{path}.output_norm.weight", (d,))
    yield _slot(f"{name}.shared_head.head.weight", HEAD, (vocabulary, d), copy=True)


def _block(config: ModelConfig, name: str, path: str, index: tuple[int, ...], *, moe: bool) -> Iterator[Slot]:
    d = config.hidden_size
    yield _slot(f"{name}.input_layernorm.weight", f"{path}.attention_norm.weight", (d,), index)
    yield from _attention(config, f"{name}.self_attn", f"{path}.attention", index)
    yield _slot(f"{name}.post_attention_layernorm.weight", f"{path}.feed_forward_norm.weight", (d,), index)
    if moe:
        yield from _mixture_of_experts(config, f"{name}.mlp", f"{path}.feed_forward", index)
    else:
        yield from _feed_forward(f"{name}.mlp", f"{path}.feed_forward", index, d, config.intermediate_size)


def _attention(config: ModelConfig, name: str, path: str, index: tuple[int, ...]) -> Iterator[Slot]:
    d, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    query_rank = config.q_lora_rank
    turned, key_value = config.qk_head_dim, config.qk_nope_head_dim + config.v_head_dim
    if query_rank is not None:
        yield _matrix(f"{name}.q_a_proj", f"{path}.q_a.weight", (query_rank, d), index)
        yield _slot(f"{name}.q_a_layernorm.weight", f"{path}.q_a_norm.weight", (query_rank,), index)
    yield _matrix(
        f"{name}.q_proj" if query_rank is None else f"{name}.q_b_proj",
        f"{path}.q_b.weight",
        (heads * turned, query_rank or d),
        index,
        (heads, turned, query_rank or d),
        rotary_head=turned,
    )
    latent_and_key = rank + config.qk_rope_head_dim
    yield _matrix(
        f"{name}.kv_a_proj_with_mqa",
        f"{path}.kv_a.weight",
        (latent_and_key, d),
        index,
        rotary_head=latent_and_key,
    )
    yield _slot(f"{name}.kv_a_layernorm.weight", f"{path}.kv_a_norm.weight", (rank,), index)
    yield _matrix(
        f"{name}.kv_b_proj",
        f"{path}.kv_b.weight",
        (heads * key_value, rank),
        index,
        (heads, key_value, rank),
    )
    value = config.v_head_dim
    yield _matrix(f"{name}.o_proj", f"{path}.o.weight", (d, heads * value), index, (d, heads, value))


def _mixture_of_experts(config: ModelConfig, name: str, path: str, index: tuple[int, ...]) -> Iterator[Slot]:
    d, width, experts = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    yield _slot(f"{name}.gate.weight", f"{path}.router.weight", (experts, d), index)
    if config.has_router_bias:
        bias = f"{name}.gate.e_score_correction_bias"
        yield _slot(bias, f"{path}.router.bias", (experts,), index, always_float32=True)
    for expert in range(experts):
        one, place = f"{name}.experts.{expert}", (*index, expert)
        yield _matrix(f"{one}.gate_proj", f"{path}.experts.gate_up", (width, d), (*place, 0))
        yield _matrix(f"{one}.up_proj", f"{path}.experts.gate_up", (width, d), (*place, 1))
        yield _matrix(f"{one}.down_proj", f"{path}.experts.down", (d, width), place)
    if config.n_shared_experts:
        yield from _feed_forward(f"{name}.shared_experts", f"{path}.shared", index, d, config.n_shared_experts * width)


def _feed_forward(name: str, path: str, index: tuple[int, ...], d: int, width: int) -> Iterator[Slot]:
    yield _matrix(f"{name}.gate_proj", f"{path}.gate_up.weight", (width, d), (*index, 0))
    yield _matrix(f"{name}.up_proj", f"{path}.gate_up.weight", (width, d), (*index, 1))
    yield _matrix(f"{name}.down_proj", f"{path}.down.weight", (d, width), index)


def _slot(
    name: str,
    path: str,
    shape: tuple[int, ...],
    index: tuple[int, ...] = (),
    *,
    always_float32: bool = False,
    copy: bool = False,
) -> Slot:
    return Slot(name, shape, path, index, shape, always_float32=always_float32, copy=copy)


def _matrix(
    name: str,
    path: str,
    shape: tuple[int, int],
    index: tuple[int, ...],
    tail: tuple[int, ...] | None = None,
    *,
    rotary_head: int = 0,
) -> Slot:
    """A linear map, which FP8 checkpoints quantise."""
    return Slot(f"{name}.weight", shape, path, index, tail or shape, quantised=True, rotary_head=rotary_head)
