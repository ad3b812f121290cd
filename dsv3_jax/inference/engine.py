"""The engine: continuously batched generation from a paged latent cache (report sections 3.4 and 5.4.3).

    engine = Engine(model, EngineConfig(max_sequences=16))
    number = engine.submit(Request(prompt=(1, 2, 3), max_new_tokens=20))
    while engine.has_work:
        for output in engine.step():
            ...

Requests of any length join and leave between steps. All shapes are compiled at the start, none later. In float32 on a
CPU a request's tokens and log-probabilities are the same bits whatever else is in the batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3_jax.errors import ConfigError, UserError
from dsv3_jax.inference import programs
from dsv3_jax.inference.pages import PageAllocator
from dsv3_jax.inference.requests import MOST_STOP_TOKENS, FinishReason, Output, Request, Result, TokenLogprobs
from dsv3_jax.inference.sampling import GREEDY, SamplerRows
from dsv3_jax.inference.scheduler import Scheduler, Sequence
from dsv3_jax.inference.stopping import StopStrings
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
      steps: decoding steps between two visits to the host, when no prompt is waiting to be read.
      drafts: tokens that the MTP module drafts per step; 0 for none, None for 1 if the model can.
      top_logprobs: most likely tokens that a request may ask for.
      reuse_prefixes: whether requests with equal beginnings share the pages of it.
      compile_at_start: whether all shapes are compiled when the engine is made; else each when it is first needed.
    """

    max_sequences: int = 16
    context: int | None = None
    cache_tokens: int | None = None
    cache_memory: int | None = None
    cache_dtype: str | None = None
    page_size: int = 16
    chunk_sizes: tuple[int, ...] = (16, 64)
    chunk_rows: int = 1
    steps: int = 8
    drafts: int | None = None
    top_logprobs: int = 20
    reuse_prefixes: bool = True
    compile_at_start: bool = True

    def __post_init__(self) -> None:
        positive = ("max_sequences", "page_size", "chunk_rows", "steps")
        for name in positive:
            if getattr(self, name) < 1:
                raise ConfigError(f"engine.{name} must be at least 1, not {getattr(self, name)}")
        if not self.chunk_sizes or list(self.chunk_sizes) != sorted(set(self.chunk_sizes)) or self.chunk_sizes[0] < 1:
            raise ConfigError(f"engine.chunk_sizes must be positive and increasing, not {self.chunk_sizes}")
        if self.cache_dtype is not None and self.cache_dtype not in CACHE_DTYPES:
            raise ConfigError(f"engine.cache_dtype must be one of {', '.join(CACHE_DTYPES)}, not {self.cache_dtype!r}")
        if self.cache_tokens is not None and self.cache_memory is not None:
            raise ConfigError("engine.cache_tokens and engine.cache_memory exclude each other; give one")


@dataclasses.dataclass
class Statistics:
    """What an engine has done since it was made.

    Attributes:
      read_tokens: tokens of prompts that were computed.
      reused_tokens: tokens of prompts whose pages were shared.
      written_tokens: tokens that requests got.
      drafted, accepted: drafts checked and accepted, by their position in a step.
      preemptions: times that a request was put back because pages ran out.
    """

    read_tokens: int = 0
    reused_tokens: int = 0
    written_tokens: int = 0
    drafted: list[int] = dataclasses.field(default_factory=list)
    accepted: list[int] = dataclasses.field(default_factory=list)
    preemptions: int = 0


class Engine:
    """Generates text for many requests at once.

    Args:
      model: a model of any precision.
      config: settings.
      to_bytes: returns the bytes of tokens, for text in outputs and for stop strings.
      progress: called before each compilation with its number, the number of all, and what is compiled.

    Raises:
      ConfigError: the settings do not fit the model.
    """

    def __init__(
        self,
        model: DeepSeekV3,
        config: EngineConfig = EngineConfig(),
        *,
        to_bytes: Callable[[SequenceOf[int]], bytes] | None = None,
        progress: Callable[[int, int, str], None] | None = None,
    ):
        self.model_config = model.config
        self.config = config
        self.context = _context(model, config)
        self.drafts = _drafts(model, config)
        self.statistics = Statistics(drafted=[0] * self.drafts, accepted=[0] * self.drafts)
        self._to_bytes = to_bytes
        self._graph, self._weights = nnx.split(model)
        dtype = jnp.dtype(config.cache_dtype or model.precision.dtype)
        count = _number_of_pages(model, config, self.context, dtype, mtp=self.drafts > 0)
        self._pages = Pages.empty(model.config, count, config.page_size, dtype, mtp=self.drafts > 0)
        self._slots = programs.Slots.empty(model.config, config.max_sequences, self.drafts, model.precision.dtype)
        self._allocator = PageAllocator(count, config.page_size)
        self._scheduler = Scheduler(
            self._allocator, config.max_sequences, self.drafts, reuse_prefixes=config.reuse_prefixes
        )
        self._sequences: dict[int, Sequence] = {}
        self._texts: dict[int, StopStrings] = {}
        self._next_number = 0
        self._table_width = -(-self.context // config.page_size)
        self._buckets = _buckets(config.max_sequences)
        if config.compile_at_start:
            self._compile(progress)

    @property
    def has_work(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._sequences)

    @property
    def waiting(self) -> int:
        """Number of requests that wait for a slot or for pages."""
        return len(self._scheduler.waiting)

    @property
    def free_pages(self) -> int:
        """Number of pages that no request holds."""
        return self._allocator.available

    @property
    def expert_load(self) -> np.ndarray:
        """Tokens that chose each expert so far, int32 [MoE layers, then the MTP block if it drafts; experts]."""
        return np.asarray(self._slots.load)

    def submit(self, request: Request) -> int:
        """Puts a request into the queue and returns its number.

        Raises:
          UserError: the model or the engine cannot serve it.
        """
        request.check(self.model_config, self.context)
        needed = -(-(len(request.prompt) + request.max_new_tokens) // self.config.page_size)
        if needed > self._allocator.count:
            raise UserError(
                f"the request needs {needed} pages of the cache, which has {self._allocator.count}; shorten the "
                "prompt, ask for fewer tokens, or give the engine a larger cache"
            )
        if (request.top_logprobs or 0) > min(self.config.top_logprobs, self.model_config.vocab_size):
            raise UserError(f"top_logprobs must be at most {self.config.top_logprobs}, not {request.top_logprobs}")
        if request.stop_strings and self._to_bytes is None:
            raise UserError("stop strings need an engine with a tokenizer (to_bytes); give stop_tokens instead")
        number = self._next_number
        self._next_number += 1
        sequence = Sequence(number, request, list(request.prompt))
        self._sequences[number] = sequence
        if self._to_bytes is not None:
            self._texts[number] = StopStrings(self._to_bytes, request.stop_strings)
        self._scheduler.add(sequence)
        return number

    def cancel(self, number: int) -> None:
        """Ends a request and frees its pages at once; nothing happens if it has ended already."""
        if number in self._sequences:
            self._end(self._sequences[number])

    def run(self, requests: Iterable[Request]) -> list[Result]:
        """Serves requests to their end; results are in their order. Other requests of the engine go on meanwhile."""
        results = {self.submit(request): Result() for request in requests}
        while any(result.finished is None for result in results.values()):
            for output in self.step():
                if output.request_id in results:
                    results[output.request_id].add(output)
        return list(results.values())

    def step(self) -> list[Output]:
        """Admits requests, reads a chunk of prompts, gives tokens to all whose prompt is read; returns what is new."""
        for sequence in self._scheduler.admit():
            self._prepare_slot(sequence)
        reading = self._scheduler.to_read(self.config.chunk_rows)
        if reading:
            self._read(reading)
        steps = 1 if self._scheduler.to_read(1) else self.config.steps
        rows, steps = self._scheduler.to_write(steps)
        self.statistics.preemptions = self._scheduler.preemptions
        self.statistics.reused_tokens = self._scheduler.reused_tokens
        return self._write(rows, steps) if rows else []

    def _prepare_slot(self, sequence: Sequence) -> None:
        sampler = sequence.request.sampler
        if not sampler.counts_tokens:
            return
        vocabulary = self.model_config.vocab_size
        in_prompt = np.zeros(vocabulary, bool)
        in_prompt[list(sequence.request.prompt)] = True
        new = sequence.tokens[len(sequence.request.prompt) :]
        count = np.bincount(np.asarray(new, np.int64), minlength=vocabulary).astype(np.int32)
        bias = np.zeros(vocabulary, np.float32)
        for token, value in sampler.logit_bias:
            bias[token] += value
        self._slots = programs.begin(self._slots, np.int32(sequence.slot), in_prompt, count, bias)

    def _read(self, sequences: list[Sequence]) -> None:
        """Reads one chunk of each sequence's prompt."""
        missing = max(len(sequence.tokens) - 1 - sequence.read for sequence in sequences)
        size = next((size for size in self.config.chunk_sizes if size >= missing), self.config.chunk_sizes[-1])
        chunk = self._empty_chunk(size)
        for row, sequence in enumerate(sequences):
            start = sequence.read
            stop = min(start + size, len(sequence.tokens) - 1)
            chunk.tokens[row, : stop - start] = sequence.tokens[start:stop]
            chunk.next_tokens[row, : stop - start] = sequence.tokens[start + 1 : stop + 1]
            chunk.positions[row, : stop - start] = range(start, stop)
            chunk.table[row, : len(sequence.pages)] = sequence.pages
            chunk.slot[row] = sequence.slot
            self.statistics.read_tokens += stop - start
            sequence.read = stop
        self._pages, self._slots = programs.read_chunk(self._graph, self._weights, self._pages, self._slots, chunk)
        for sequence in sequences:
            if not sequence.is_reading:
                self._scheduler.finished_reading(sequence)

    def _write(self, sequences: list[Sequence], steps: int) -> list[Output]:
        """Gives tokens to the sequences."""
        running = self._empty_running(next(size for size in self._buckets if size >= len(sequences)))
        requests = [sequence.request for sequence in sequences]
        filler = [Request(prompt=(0,))] * (len(running.slot) - len(sequences))
        samplers = SamplerRows.of(*zip(*((r.sampler, r.seed) for r in [*requests, *filler]), strict=True))
        running = dataclasses.replace(running, sampler=samplers)
        width = 1 + self.drafts
        for row, sequence in enumerate(sequences):
            last = sequence.tokens[-width:]
            running.tokens[row, width - len(last) :] = last
            running.valid[row] = sequence.valid
            running.position[row] = len(sequence.tokens) - 1
            running.remaining[row] = sequence.remaining
            running.stop_tokens[row, : len(sequence.request.stop_tokens)] = sequence.request.stop_tokens
            running.wants_logprobs[row] = sequence.request.top_logprobs is not None
            running.table[row, : len(sequence.pages)] = sequence.pages
            running.slot[row] = sequence.slot
        written = self._call_write(running, steps)
        return [self._output(sequence, written, row) for row, sequence in enumerate(sequences)]

    def _output(self, sequence: Sequence, written: programs.Written, row: int) -> Output:
        """Appends what a sequence was given; ends it if that completes it."""
        request = sequence.request
        text = self._texts.get(sequence.number)
        tokens: list[int] = []
        drafted: list[bool] = []
        logprobs: list[TokenLogprobs] = []
        pieces: list[str] = []
        finished: FinishReason | None = None
        for step in range(len(written.count)):
            count = int(written.count[step, row])
            if not count or finished:
                break
            for number in range(self.drafts):
                # A draft counts as checked if those before it were accepted and the text went on.
                self.statistics.drafted[number] += number < count
                self.statistics.accepted[number] += number + 1 < count
            sequence.valid = count
            for at in range(count):
                token = int(written.tokens[step, row, at])
                tokens.append(token)
                drafted.append(at + 1 < count)
                if request.top_logprobs is not None:
                    logprobs.append(_logprobs(written, (step, row, at), request.top_logprobs))
                if token in request.stop_tokens:
                    finished = "stop"
                elif text is not None:
                    pieces.append(text.add(token))
                    finished = "stop" if text.found else None
                if finished is None and len(sequence.tokens) + len(tokens) == sequence.final_length:
                    finished = "length"
                if finished:
                    break
        sequence.tokens += tokens
        sequence.read = len(sequence.tokens) - 1
        self.statistics.written_tokens += len(tokens)
        if finished:
            if text is not None:
                pieces.append(text.end())
            self._end(sequence)
        return Output(sequence.number, tuple(tokens), tuple(drafted), tuple(logprobs), "".join(pieces), finished)

    def _end(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        del self._sequences[sequence.number]
        self._texts.pop(sequence.number, None)

    def _call_write(self, running: programs.Running, steps: int) -> programs.Written:
        self._pages, self._slots, written = programs.write_tokens(
            self._graph,
            self._weights,
            self._pages,
            self._slots,
            running,
            np.int32(steps),
            most_steps=self.config.steps,
            top=self.config.top_logprobs,
        )
        return jax.tree.map(np.asarray, written)

    def _empty_chunk(self, size: int) -> programs.Chunk:
        rows = self.config.chunk_rows
        arrays: dict[str, Any] = {
            "tokens": np.zeros((rows, size), np.int32),
            "next_tokens": np.zeros((rows, size), np.int32),
            "positions": np.full((rows, size), -1, np.int32),
            "table": np.full((rows, self._table_width), self._allocator.count, np.int32),
            "slot": np.full(rows, self.config.max_sequences, np.int32),
        }
        return programs.Chunk(**arrays)

    def _empty_running(self, rows: int) -> programs.Running:
        arrays: dict[str, Any] = {
            "tokens": np.zeros((rows, 1 + self.drafts), np.int32),
            "valid": np.zeros(rows, np.int32),
            "position": np.zeros(rows, np.int32),
            "remaining": np.zeros(rows, np.int32),
            "stop_tokens": np.full((rows, MOST_STOP_TOKENS), -1, np.int32),
            "wants_logprobs": np.zeros(rows, bool),
            "sampler": SamplerRows.of([GREEDY] * rows, [0] * rows),
            "table": np.full((rows, self._table_width), self._allocator.count, np.int32),
            "slot": np.full(rows, self.config.max_sequences, np.int32),
        }
        return programs.Running(**arrays)

    def _compile(self, progress: Callable[[int, int, str], None] | None) -> None:
        """Compiles every shape by running it on padding alone."""
        total = len(self.config.chunk_sizes) + len(self._buckets) + 1
        report = progress or (lambda number, total, what: None)
        done = 0
        for size in self.config.chunk_sizes:
            report(done, total, f"reading {size} tokens of a prompt")
            self._pages, self._slots = programs.read_chunk(
                self._graph, self._weights, self._pages, self._slots, self._empty_chunk(size)
            )
            done += 1
        for rows in self._buckets:
            report(done, total, f"writing tokens of {rows} requests")
            self._call_write(self._empty_running(rows), 1)
            done += 1
        report(done, total, "penalties and logit bias")
        vocabulary = self.model_config.vocab_size
        self._slots = programs.begin(
            self._slots, np.int32(0), *(np.zeros(vocabulary, dtype) for dtype in (bool, np.int32, np.float32))
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


def _number_of_pages(model: DeepSeekV3, config: EngineConfig, context: int, dtype: jnp.dtype, *, mtp: bool) -> int:
    tokens = config.max_sequences * -(-context // config.page_size) * config.page_size
    if config.cache_tokens is not None:
        tokens = config.cache_tokens
    if config.cache_memory is not None:
        tokens = tokens_that_fit(config.cache_memory, model.config, dtype, config.page_size, mtp=mtp)
    if tokens < config.page_size:
        raise ConfigError(f"the engine's cache has room for {tokens} tokens, less than a page of {config.page_size}")
    return tokens // config.page_size


def _buckets(most: int) -> list[int]:
    """Returns the numbers of rows that are compiled: powers of two, and the most."""
    sizes = [1]
    while sizes[-1] < most:
        sizes.append(min(2 * sizes[-1], most))
    return sizes


def _logprobs(written: programs.Written, index: tuple[int, int, int], top: int) -> TokenLogprobs:
    tokens, values = written.top_tokens[index][:top].tolist(), written.top_logprobs[index][:top].tolist()
    return TokenLogprobs(float(written.logprobs[index]), tuple(zip(tokens, values, strict=True)))
