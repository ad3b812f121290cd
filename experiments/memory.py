"""Counts the bytes that MLA caches and keeps, against MHA, GQA and MQA of the same width, and what FP8 keeps.

    python experiments/memory.py [--scale tiny|small|1b|v3]

Report sections 2.1.1 (the cache) and 3.3.3 (activations). Three tables, none needs an accelerator:
  cache: bytes per token and layer, calculated, and measured as the size of the arrays that `init_cache` (MLA) or plain
    keys and values allocate.
  attention: bytes that one layer's attention keeps for its backward pass, counted from its jaxpr.
  step: bytes that the whole model keeps of a batch, counted the same way, for each precision and rematerialisation.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ablation import RESULTS, Options, new_figure, tiny_model, write_results
from command_line import CommandLine, folder
from flax import nnx
from jaxtyping import Array, Float

from dsv3_jax.config import ModelConfig
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.modules.attention_core import causal_attention
from dsv3_jax.modules.latent_attention import LatentAttention
from dsv3_jax.modules.rope import make_rotation
from dsv3_jax.precision import Precision, linear, saved_bytes

GROUPS = 8  # key-value heads of GQA, or fewer where there are fewer heads
PRECISIONS = ("float32", "bfloat16", "fp8")
POLICIES = ("none", "report", "full")


@dataclasses.dataclass(frozen=True)
class Size:
    """A model and a batch for which bytes are counted."""

    model: ModelConfig
    batch: int
    length: int
    counts_step: bool = True


SIZES = {
    "tiny": Size(tiny_model(), 8, 64),
    "small": Size(ModelConfig.preset("nano"), 8, 256),
    "1b": Size(ModelConfig.preset("1b"), 4, 2048),
    "v3": Size(ModelConfig.preset("v3-671b"), 1, 4096, counts_step=False),
}


def main(argv: list[str] | None = None) -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("--scale", nargs="+", choices=list(SIZES), default=["tiny", "small", "v3"])
    parser.add_argument("--out", type=folder, default=RESULTS / "memory")
    given = parser.parse_args(argv)
    options = Options("memory", ",".join(given.scale), (0,), given.out, Path(), 0)
    tables = {name: tables_of(SIZES[name]) for name in given.scale}
    for name, table in tables.items():
        print(name, {kind: values for kind, values in table.items() if kind != "step"})
        for precision, policies in table.get("step", {}).items():
            print(f"    {precision:9}", {policy: f"{size / 2**20:.2f} MiB" for policy, size in policies.items()})
    last = given.scale[-1]
    write_results(options, {"memory": draw(tables)}, _verdict(last, tables), {"tables": tables})


def tables_of(size: Size) -> dict[str, Any]:
    """Returns the three tables of one size, in bytes."""
    heads = {"MHA": size.model.num_attention_heads, "GQA": min(GROUPS, size.model.num_attention_heads // 2), "MQA": 1}
    tables: dict[str, Any] = {
        "cache calculated": cache_calculated(size.model, heads),
        "cache measured": cache_measured(size.model, heads),
        "attention": {
            "MLA": attention_saved(size, None),
            **{name: attention_saved(size, count) for name, count in heads.items()},
        },
        "attention, MLA in FP8": attention_saved(size, None, "fp8"),
    }
    if size.counts_step:
        tables["step"] = {
            precision: {policy: step_saved(size, precision, policy) for policy in POLICIES} for precision in PRECISIONS
        }
    return tables


def cache_calculated(model: ModelConfig, heads: dict[str, int]) -> dict[str, int]:
    """Returns bfloat16 bytes per token and layer: latent and rotary key, or keys and values of every key-value head."""
    width = model.qk_nope_head_dim + model.qk_rope_head_dim + model.v_head_dim
    mla = 2 * (model.kv_lora_rank + model.qk_rope_head_dim)
    return {"MLA": mla, **{name: 2 * count * width for name, count in heads.items()}}


def cache_measured(model: ModelConfig, heads: dict[str, int]) -> dict[str, float]:
    """Returns the cache's bytes per token and layer, measured on the arrays of one sequence of 64 tokens."""
    length = 64

    def latents() -> Any:
        made = DeepSeekV3(model, rngs=nnx.Rngs(0), precision=Precision.preset("bfloat16"))
        return made.init_cache(1, length)

    def plain(count: int) -> Any:
        key_width = model.qk_nope_head_dim + model.qk_rope_head_dim
        return [
            jnp.zeros((model.num_hidden_layers, 1, length, count, width), jnp.bfloat16)
            for width in (key_width, model.v_head_dim)
        ]

    caches = {
        "MLA": jax.eval_shape(latents),
        **{name: jax.eval_shape(lambda c=c: plain(c)) for name, c in heads.items()},
    }
    tokens = model.num_hidden_layers * length
    return {name: _bytes(cache) / tokens for name, cache in caches.items()}


def attention_saved(size: Size, key_value_heads: int | None, precision: str = "bfloat16") -> int:
    """Returns the bytes that a layer's attention keeps of a batch: MLA, or attention with that many key-value heads."""
    model, recipe = size.model, Precision.preset(precision)
    x = jax.ShapeDtypeStruct((size.batch, size.length, model.hidden_size), recipe.dtype)
    positions = jnp.broadcast_to(jnp.arange(size.length), (size.batch, size.length))
    if key_value_heads is None:
        module = nnx.eval_shape(
            lambda: LatentAttention(model, dtype=jnp.dtype(jnp.float32), precision=recipe, rngs=nnx.Rngs(0))
        )
        graph, params = nnx.split(module)

        def latent(params: Any, x: Array) -> Array:
            return nnx.merge(graph, params)(x, make_rotation(model, positions))[0]

        return sum(saved_bytes(latent, params, x).values())
    width, heads = model.qk_head_dim, model.num_attention_heads
    shapes = [(heads * width, model.hidden_size), (key_value_heads * (width + model.v_head_dim), model.hidden_size)]
    shapes.append((model.hidden_size, heads * model.v_head_dim))
    weights = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return sum(saved_bytes(_plain_attention(model, key_value_heads, recipe), weights, x).values())


def _plain_attention(model: ModelConfig, key_value_heads: int, recipe: Precision):
    """Returns attention whose query heads share `key_value_heads` heads of keys and values evenly; no positions."""
    heads, width = model.num_attention_heads, model.qk_head_dim

    def attend(weights: list[Array], x: Float[Array, "B T d"]) -> Float[Array, "B T d"]:
        to_query, to_key_value, to_out = weights
        query = linear(x, to_query, recipe).reshape(*x.shape[:2], heads, width)
        pairs = linear(x, to_key_value, recipe).reshape(*x.shape[:2], key_value_heads, -1)
        key, value = jnp.split(jnp.repeat(pairs, heads // key_value_heads, axis=2), [width], axis=-1)
        attended = causal_attention(query, key, value, scale=1 / math.sqrt(width))
        return linear(attended.reshape(*x.shape[:2], -1), to_out, recipe, after_attention=True)

    return attend


def step_saved(size: Size, precision: str, policy: str) -> int:
    """Returns the bytes that the model keeps of a training batch, up to the head, whose logits are recomputed."""
    module = nnx.eval_shape(
        lambda: DeepSeekV3(size.model, rngs=nnx.Rngs(0), precision=Precision.preset(precision), remat=policy)
    )
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    constants = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), rest)
    tokens = jax.ShapeDtypeStruct((size.batch, size.length), jnp.int32)

    def loss(params: Any, tokens: Array) -> Array:
        features = nnx.merge(graph, params, constants).features(tokens)
        return jnp.sum(
            jnp.stack([jnp.sum(hidden, dtype=jnp.float32) for hidden in (features.hidden, *features.mtp_hidden)])
        )

    return sum(saved_bytes(loss, params, tokens).values())


def draw(tables: dict[str, Any]):
    """Draws one panel for each size's cache per token and layer, and one for the bytes that a training step keeps."""
    figure, axes = new_figure(len(tables) + 1, width=4.0)
    for axis, (name, table) in zip(axes, tables.items(), strict=False):
        cache = table["cache calculated"]
        axis.bar(list(cache), list(cache.values()), color="tab:blue")
        axis.set(yscale="log", title=f"{name}: cache per token and layer", ylabel="bytes (bfloat16)")
    steps = next(table["step"] for table in reversed(tables.values()) if "step" in table)
    for shift, (precision, policies) in enumerate(steps.items()):
        at = [index + 0.25 * shift for index in range(len(policies))]
        axes[-1].bar(at, [size / 2**20 for size in policies.values()], width=0.25, label=precision)
    axes[-1].set_xticks([index + 0.25 for index in range(len(POLICIES))], POLICIES)
    axes[-1].set(title="kept by a training step", ylabel="MiB", xlabel="rematerialisation")
    axes[-1].legend()
    return figure


def _verdict(name: str, tables: dict[str, Any]) -> str:
    cache, kept = tables[name]["cache calculated"], tables[name]["attention"]
    measured = tables[name]["cache measured"]
    agree = all(math.isclose(cache[kind], measured[kind]) for kind in cache)
    steps = next(table["step"] for table in reversed(tables.values()) if "step" in table)
    return (
        f"At {name} MLA caches {cache['MLA']} bytes per token and layer, {cache['MHA'] / cache['MLA']:.1f} times less "
        f"than MHA and {cache['GQA'] / cache['MLA']:.1f} times less than GQA with {GROUPS} groups "
        f"(MQA: {cache['MQA']}), {'as measured' if agree else 'which the arrays do not confirm'}; in training "
        f"its attention keeps {kept['MLA'] / kept['MHA']:.2f} times MHA's bytes; FP8 keeps "
        f"{steps['fp8']['none'] / steps['bfloat16']['none']:.2f} times bfloat16's activations without "
        f"rematerialisation and {steps['fp8']['report'] / steps['bfloat16']['report']:.2f} times with the report's."
    )


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
    main()
