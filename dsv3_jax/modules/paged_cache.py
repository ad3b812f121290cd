"""A latent cache in pages of a fixed number of tokens, which sequences of different lengths share.

`Pages` holds the entries of all pages. `PagedCache` is a batch's view of them: a table names the pages of each
sequence in the order of its positions. Which sequence has which page is decided by `dsv3_jax.inference.pages`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig

FP8 = jnp.dtype(jnp.float8_e4m3fn)
_LARGEST = float(jnp.finfo(FP8).max)
_BLOCK = 128  # positions that attention reads at a time


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pages:
    """The entries of all pages: normed latents c^KV and rotated keys k^R of every layer.

    Attributes:
      latent: float32, bfloat16, or e4m3 with one float32 scale per token.
      rope_key: in the dtype of `latent`, or bfloat16 beside e4m3 latents.
      scale: latent = stored value * scale; None unless the latents are e4m3.
      experts: int16, the experts that each token chose in the MoE layers of the main model; None unless recorded.
    """

    latent: Float[Array, "L P page kv_rank"]
    rope_key: Float[Array, "L P page rope"]
    scale: Float[Array, "L P page"] | None
    experts: Int[Array, "P page layers K"] | None

    @classmethod
    def empty(
        cls, config: ModelConfig, pages: int, page_size: int, dtype: jnp.dtype, *, mtp: bool, experts: bool = False
    ) -> Pages:
        """Returns pages of zeros; with `mtp`, for the MTP blocks too, and with `experts`, for the chosen experts."""
        shape = (_layers(config, mtp), pages, page_size)
        chosen = (pages, page_size, config.num_moe_layers, config.num_experts_per_tok)
        fp8 = dtype == FP8
        return cls(
            latent=jnp.zeros((*shape, config.kv_lora_rank), dtype),
            rope_key=jnp.zeros((*shape, config.qk_rope_head_dim), jnp.bfloat16 if fp8 else dtype),
            scale=jnp.zeros(shape, jnp.float32) if fp8 else None,
            experts=jnp.zeros(chosen, jnp.int16) if experts else None,
        )

    def of(self, pages: Int[Array, " N"]) -> Pages:
        """Returns copies of N pages; the entries of an index that is no page have no meaning."""
        taken = dataclasses.replace(self, experts=None)
        taken = jax.tree.map(lambda entries: entries.at[:, pages].get(mode="clip"), taken)
        if self.experts is None:
            return taken
        return dataclasses.replace(taken, experts=self.experts.at[pages].get(mode="clip"))

    def with_pages(self, pages: Int[Array, " N"], new: Pages) -> Pages:
        """Returns the entries with N pages replaced by those of `new`; an index that is no page is dropped."""
        layers, others = (dataclasses.replace(each, experts=None) for each in (self, new))
        layers = jax.tree.map(lambda own, other: own.at[:, pages].set(other, mode="drop"), layers, others)
        if self.experts is None or new.experts is None:
            return layers
        return dataclasses.replace(layers, experts=self.experts.at[pages].set(new.experts, mode="drop"))

    @property
    def count(self) -> int:
        """Number of pages."""
        return self.latent.shape[1]

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self.latent.shape[2]


def bytes_per_token(config: ModelConfig, dtype: jnp.dtype, *, mtp: bool, experts: bool = False) -> int:
    """Returns the bytes that one token takes in the cache.

    They are those of every layer's latent, rotary key and, in FP8, scale; with `experts`, of the chosen experts too.
    """
    if dtype == FP8:
        per_layer = config.kv_lora_rank + 2 * config.qk_rope_head_dim + 4
    else:
        per_layer = (config.kv_lora_rank + config.qk_rope_head_dim) * dtype.itemsize
    chosen = 2 * config.num_moe_layers * config.num_experts_per_tok if experts else 0
    return _layers(config, mtp) * per_layer + chosen


def tokens_that_fit(
    memory: int, config: ModelConfig, dtype: jnp.dtype, page_size: int, *, mtp: bool, experts: bool = False
) -> int:
    """Returns how many tokens fit `memory` bytes of whole pages."""
    return memory // (bytes_per_token(config, dtype, mtp=mtp, experts=experts) * page_size) * page_size


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedCache:
    """The pages as a batch of sequences sees them.

    Attributes:
      pages: the entries.
      table: page of each sequence's positions 0 .. page_size - 1, and so on; the number of pages where it has none.
    """

    pages: Pages
    table: Int[Array, "B N"]

    @property
    def block_length(self) -> int:
        """Positions per block: a whole number of pages."""
        return self._pages_per_block * self.pages.page_size

    @property
    def blocks(self) -> int:
        """Number of blocks that the table covers."""
        return -(-self.table.shape[1] // self._pages_per_block)

    @property
    def _pages_per_block(self) -> int:
        return min(max(_BLOCK // self.pages.page_size, 1), self.table.shape[1])

    def write(
        self,
        layer: Int[Array, ""] | int,
        positions: Int[Array, "B T"],
        latent: Float[Array, "B T kv_rank"],
        rope_key: Float[Array, "B T rope"],
    ) -> PagedCache:
        """Returns the cache with new entries of one layer; negative positions and those without a page are dropped."""
        pages = self.pages
        index = (layer, *self._index(positions))
        scale = pages.scale
        if scale is not None:
            wide = latent.astype(jnp.float32)
            own = jnp.maximum(jnp.max(jnp.abs(wide), axis=-1), jnp.finfo(jnp.float32).tiny * _LARGEST) / _LARGEST
            latent = jnp.clip(wide / own[..., None], -_LARGEST, _LARGEST)
            scale = scale.at[index].set(own, mode="drop")
        entries = dataclasses.replace(
            pages,
            latent=pages.latent.at[index].set(latent.astype(pages.latent.dtype), mode="drop"),
            rope_key=pages.rope_key.at[index].set(rope_key.astype(pages.rope_key.dtype), mode="drop"),
            scale=scale,
        )
        return dataclasses.replace(self, pages=entries)

    def with_experts(self, positions: Int[Array, "B T"], experts: Int[Array, "layers B T K"] | None) -> PagedCache:
        """Returns the cache with the experts that tokens chose, if its pages record them."""
        if self.pages.experts is None or experts is None:
            return self
        chosen = jnp.moveaxis(experts, 0, 2).astype(jnp.int16)
        recorded = self.pages.experts.at[self._index(positions)].set(chosen, mode="drop")
        return dataclasses.replace(self, pages=dataclasses.replace(self.pages, experts=recorded))

    def _index(self, positions: Int[Array, "B T"]) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
        """Returns the page of each position and its place in it; the number of pages where there is none."""
        size, none = self.pages.page_size, self.pages.count
        rows = jnp.arange(len(positions))[:, None]
        page = self.table.at[rows, positions // size].get(mode="fill", fill_value=none)
        return jnp.where(positions < 0, none, page), positions % size

    def read(
        self, layer: Int[Array, ""] | int, block: Int[Array, ""] | int, dtype: jnp.dtype
    ) -> tuple[Float[Array, "B S kv_rank"], Float[Array, "B S rope"]]:
        """Returns a block of every sequence. Where a sequence has no page, the entries are those of another page."""
        width = self._pages_per_block
        table = jnp.pad(self.table, ((0, 0), (0, self.blocks * width - self.table.shape[1])))
        own = jax.lax.dynamic_slice_in_dim(table, block * width, width, axis=1)

        def gather(entries: Float[Array, "L P page ..."]) -> Float[Array, "B S ..."]:
            found = entries.at[layer, own].get(mode="clip")
            return found.reshape(found.shape[0], -1, *found.shape[3:])

        latent = gather(self.pages.latent).astype(dtype)
        if self.pages.scale is not None:
            latent = (latent * gather(self.pages.scale)[..., None]).astype(dtype)
        return latent, gather(self.pages.rope_key).astype(dtype)


def _layers(config: ModelConfig, mtp: bool) -> int:
    return config.num_hidden_layers + (config.num_nextn_predict_layers if mtp else 0)
