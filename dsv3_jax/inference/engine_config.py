"""The settings of an engine, and the sizes that follow from them and from a model."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from dsv3_jax.errors import ConfigError
from dsv3_jax.inference.device_sets import DeviceSets
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.modules.paged_cache import Pages, tokens_that_fit

CACHE_DTYPES = ("float32", "bfloat16", "float8_e4m3fn")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of an engine.

    Attributes:
      max_sequences: most requests that run at a time.
      context: most tokens of a request, prompt included; the model's context if None.
      cache_tokens: tokens that the cache has room for; None for `max_sequences` times `context`. See `tokens_that_fit`.
      cache_memory: bytes of the cache, instead of `cache_tokens`.
      cache_dtype: float32, bfloat16 or float8_e4m3fn; None for the dtype the model computes in.
      page_size: tokens per page of the cache.
      chunk_sizes: numbers of tokens of a prompt that may be read at a time, increasing.
      chunk_rows: most prompts that are read at a time.
      micro_batches: 1, or 2 to read a chunk's prompts as two micro-batches, so that on a mesh tokens of one are sent to
        their experts and back while the other is multiplied (report section 3.4.1). The texts are the same.
      steps: decoding steps between two visits to the host, when no prompt is waiting to be read.
      drafts: tokens that the MTP module drafts per step; 0 for none, None for 1 if the model can.
      top_logprobs: most likely tokens that a request may ask for.
      score_prompts: whether requests may ask for log-probabilities of their prompt's tokens (`Request.score_from`).
      reuse_prefixes: whether requests with equal beginnings share the pages of it.
      record_experts: whether outputs say which experts each token chose. The cache keeps them for shared beginnings.
      int8_weights: whether the engine keeps the weights of products in int8, a quarter of float32's memory, and
        multiplies in int8 (`dsv3_jax.precision.int8_weight`), which is faster on a CPU.
      tiled_weights: whether an engine on one CPU keeps copies of weights that decoding reads faster: of a float32 model
        all weights of products, in tiles (`dsv3_jax.precision.tiled_weight`); of a bfloat16 model the experts', as an
        array for each layer. Drafts are then computed in int8, which changes how many are accepted but not the text.
        Not with redundant experts.
      redundant_experts: copies of routed experts of each layer, of those that serve most tokens (section 3.4).
      requests_per_placement: finished requests after which the copies are chosen anew by the load measured since.
      sets: meshes of two sets of devices, one of which reads prompts while the other generates; None where the model's
        devices do both.
      compile_at_start: whether all shapes are compiled when the engine is made; else each when it is first needed.
    """

    max_sequences: int = 16
    context: int | None = None
    cache_tokens: int | None = None
    cache_memory: int | None = None
    cache_dtype: str | None = None
    page_size: int = 16
    chunk_sizes: tuple[int, ...] = (16, 64)
    chunk_rows: int = 2
    micro_batches: int = 1
    steps: int = 8
    drafts: int | None = None
    top_logprobs: int = 20
    score_prompts: bool = False
    reuse_prefixes: bool = True
    record_experts: bool = False
    int8_weights: bool = False
    tiled_weights: bool = True
    redundant_experts: int = 0
    requests_per_placement: int = 100
    sets: DeviceSets | None = None
    compile_at_start: bool = True

    def __post_init__(self) -> None:
        positive = ("max_sequences", "page_size", "chunk_rows", "steps", "requests_per_placement")
        for name in positive:
            if getattr(self, name) < 1:
                raise ConfigError(f"engine.{name} must be at least 1, not {getattr(self, name)}")
        if not self.chunk_sizes or list(self.chunk_sizes) != sorted(set(self.chunk_sizes)) or self.chunk_sizes[0] < 1:
            raise ConfigError(f"engine.chunk_sizes must be positive and increasing, not {self.chunk_sizes}")
        if self.cache_dtype is not None and self.cache_dtype not in CACHE_DTYPES:
            raise ConfigError(f"engine.cache_dtype must be one of {', '.join(CACHE_DTYPES)}, not {self.cache_dtype!r}")
        if self.micro_batches not in (1, 2):
            raise ConfigError(f"engine.micro_batches must be 1 or 2, not {self.micro_batches}")
        if self.redundant_experts < 0:
            raise ConfigError(f"engine.redundant_experts must be 0 or more, not {self.redundant_experts}")
        if self.cache_tokens is not None and self.cache_memory is not None:
            raise ConfigError("engine.cache_tokens and engine.cache_memory exclude each other; give one")
        if self.sets is not None and self.score_prompts:
            raise ConfigError("engine.score_prompts needs one set of devices; leave out engine.sets")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of an engine's arrays.

    Attributes:
      slots: most requests that run at a time, rounded up to what the devices of a mesh share.
      context: most tokens of a request.
      drafts: tokens that the MTP module drafts per step.
      pages: number of pages of the cache.
      page_size: tokens per page.
      chunk_rows: prompts that are read at a time: no more than slots, rounded up to what the devices share in every
        micro-batch.
      batch_ranks: the number of rows of every batch is a multiple of this.
    """

    slots: int
    context: int
    drafts: int
    pages: int
    page_size: int
    chunk_rows: int
    batch_ranks: int

    @classmethod
    def of(cls, config: EngineConfig, model: DeepSeekV3) -> Sizes:
        """Returns the sizes for a model.

        Raises:
          ConfigError: the settings do not fit the model.
        """
        context, drafts = _context(model, config), _drafts(model, config)
        pages = _number_of_pages(model, config, context, drafts)
        ranks = model.devices.batch_ranks
        slots = -(-config.max_sequences // ranks) * ranks
        together = ranks * config.micro_batches
        chunk_rows = -(-min(config.chunk_rows, slots) // together) * together
        return cls(slots, context, drafts, pages, config.page_size, chunk_rows, ranks)

    @property
    def table_width(self) -> int:
        """Most pages of a request."""
        return -(-self.context // self.page_size)

    @property
    def row_counts(self) -> list[int]:
        """Numbers of rows that programs are compiled for: the fewest, each twice the one before, and the most."""
        counts = [self.batch_ranks]
        while counts[-1] < self.slots:
            counts.append(min(2 * counts[-1], self.slots))
        return counts


def cache_dtype(config: EngineConfig, model: DeepSeekV3) -> jnp.dtype:
    """Returns the dtype of the cache."""
    return jnp.dtype(config.cache_dtype or model.precision.dtype)


def empty_pages(config: EngineConfig, model: DeepSeekV3, sizes: Sizes) -> Pages:
    """Returns the empty cache."""
    dtype = cache_dtype(config, model)
    return Pages.empty(
        model.config, sizes.pages, sizes.page_size, dtype, mtp=sizes.drafts > 0, experts=config.record_experts
    )


def _context(model: DeepSeekV3, config: EngineConfig) -> int:
    longest = model.config.max_position_embeddings
    context = longest if config.context is None else config.context
    if not 1 <= context <= longest:
        raise ConfigError(f"engine.context must be from 1 to the model's context of {longest}, not {context}")
    return context


def _drafts(model: DeepSeekV3, config: EngineConfig) -> int:
    can = model.config.num_nextn_predict_layers > 0 and model.config.mtp_hidden_after_final_norm
    if config.drafts is None:
        return int(can)
    if config.drafts < 0:
        raise ConfigError(f"engine.drafts must be 0 or more, not {config.drafts}")
    if config.drafts and not can:
        raise ConfigError(
            f"engine.drafts is {config.drafts}, but drafts need a model with an MTP module that reads hidden states "
            "after the final norm (num_nextn_predict_layers > 0, mtp_hidden_after_final_norm); use 0"
        )
    return config.drafts


def _number_of_pages(model: DeepSeekV3, config: EngineConfig, context: int, drafts: int) -> int:
    tokens = config.max_sequences * -(-context // config.page_size) * config.page_size
    if config.cache_tokens is not None:
        tokens = config.cache_tokens
    if config.cache_memory is not None:
        tokens = tokens_that_fit(
            config.cache_memory,
            model.config,
            cache_dtype(config, model),
            config.page_size,
            mtp=drafts > 0,
            experts=config.record_experts,
        )
    if tokens < config.page_size:
        raise ConfigError(f"the engine's cache has room for {tokens} tokens, less than a page of {config.page_size}")
    return tokens // config.page_size
