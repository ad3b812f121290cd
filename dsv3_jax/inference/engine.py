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
import functools
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf

import jax
import numpy as np
from flax import nnx

from dsv3_jax.errors import ConfigError, UserError
from dsv3_jax.inference import programs
from dsv3_jax.inference.batches import chunk_length, chunk_of, running_of, table_of, text_of
from dsv3_jax.inference.engine_config import EngineConfig, Sizes, empty_pages
from dsv3_jax.inference.pages import PageAllocator
from dsv3_jax.inference.prefill_set import Piece, PrefillSet, received
from dsv3_jax.inference.redundancy import OwnModel
from dsv3_jax.inference.requests import FinishReason, Output, Request, Result, TokenLogprobs
from dsv3_jax.inference.sampling import Sampler
from dsv3_jax.inference.scheduler import Scheduler, Sequence
from dsv3_jax.inference.scores import Scores
from dsv3_jax.inference.stopping import StopStrings
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.modules.devices import OneDevice
from dsv3_jax.sharding.moved_model import on_devices


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

    def count_draft(self, position: int, accepted: bool) -> None:
        """Counts a token that was written at a position in its step; at the last position there is no draft."""
        if position < len(self.drafted):
            self.drafted[position] += 1
            self.accepted[position] += accepted


class Engine:
    """Generates text for many requests at once.

    Args:
      model: a model of any precision. With `config.sets` its weights are copied to both sets of devices.
      config: settings.
      to_bytes: returns the bytes of tokens, for text in outputs and for stop strings.
      progress: called before each compilation with its number, the number of all, and what is compiled.

    Attributes:
      prefill: the devices that read prompts; None where the same devices generate.

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
        self._sets = None if config.sets is None else config.sets.devices_for(model.config)
        self.prefill: PrefillSet | None = None
        if self._sets is not None:
            read_by, model = (on_devices(model, devices) for devices in self._sets)
            self.prefill = PrefillSet(read_by, config, self._sets[1])
        self._devices = model.devices
        self.sizes = Sizes.of(config, model)
        self.context, self.drafts = self.sizes.context, self.sizes.drafts
        self.statistics = Statistics(drafted=[0] * self.drafts, accepted=[0] * self.drafts)
        self._to_bytes = to_bytes
        self._own = OwnModel(config)
        self._ended = 0
        self._graph, self._weights = programs.ModelGraph.split(self._own(model))
        slots = programs.Slots.empty(model.config, self.sizes.slots, self.drafts, model.precision.dtype)
        state = model.devices.replicated((empty_pages(config, model, self.sizes), slots))
        if isinstance(model.devices, OneDevice):
            # Bound to the device like the programs' outputs where the weights are, as those of a checkpoint: otherwise
            # JAX would compile the first program twice, the second time when it is first needed.
            state = jax.device_put(state, jax.tree.leaves(self._weights)[0].sharding)
        self._pages, self._slots = state
        self._allocator = PageAllocator(self.sizes.pages, config.page_size)
        reuse = config.reuse_prefixes and self.prefill is None
        self._scheduler = Scheduler(self._allocator, self.sizes.slots, self.drafts, reuse_prefixes=reuse)
        self._sequences: dict[int, Sequence] = {}
        self._texts: dict[int, StopStrings] = {}
        self._next_number = 0
        if config.compile_at_start:
            self._compile(progress)

    @property
    def has_work(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._sequences)

    @property
    def waiting(self) -> int:
        """Number of requests that wait for a slot or for pages."""
        return sum(len(each.waiting) for each in self.schedulers)

    @property
    def running(self) -> int:
        """Number of requests that have a slot."""
        return sum(len(each.running) for each in self.schedulers)

    @property
    def free_pages(self) -> int:
        """Number of pages that no request holds, of the decode set's where there are two sets of devices."""
        return self._allocator.available

    @property
    def expert_load(self) -> np.ndarray:
        """Tokens that chose each expert so far, int32 [MoE layers, then the MTP block if it drafts; experts]."""
        return self._load if self.prefill is None else self._load + self.prefill.load

    @property
    def _load(self) -> np.ndarray:
        return np.asarray(self._slots.load)

    @property
    def schedulers(self) -> list[Scheduler]:
        """The scheduler of each set of devices, the prefill set first; requests wait in the first one's queue."""
        return [self._scheduler] if self.prefill is None else [self.prefill.scheduler, self._scheduler]

    def submit(self, request: Request) -> int:
        """Puts a request into the queue and returns its number.

        Raises:
          UserError: the model or the engine cannot serve it.
        """
        request.check(self.model_config, self.context)
        needed = -(-(len(request.prompt) + request.max_new_tokens) // self.config.page_size)
        there_are = min(each.allocator.count for each in self.schedulers)
        if needed > there_are:
            raise UserError(
                f"the request needs {needed} pages of the cache, which has {there_are}; shorten the "
                "prompt, ask for fewer tokens, or give the engine a larger cache"
            )
        if (request.top_logprobs or 0) > min(self.config.top_logprobs, self.model_config.vocab_size):
            raise UserError(f"top_logprobs must be at most {self.config.top_logprobs}, not {request.top_logprobs}")
        if request.score_from is not None and not self.config.score_prompts:
            raise UserError("score_from needs an engine with score_prompts")
        if request.stop_strings and self._to_bytes is None:
            raise UserError("stop strings need an engine with a tokenizer (to_bytes); give stop_tokens instead")
        number = self._next_number
        self._next_number += 1
        scores = None if request.score_from is None else []
        sequence = Sequence(number, request, list(request.prompt), scores=scores)
        self._sequences[number] = sequence
        if self._to_bytes is not None:
            self._texts[number] = StopStrings(self._to_bytes, request.stop_strings)
        self.schedulers[0].add(sequence)
        return number

    def cancel(self, number: int) -> None:
        """Ends a request and frees its pages at once; nothing happens if it has ended already."""
        if number in self._sequences:
            self._end(self._sequences[number])

    def update(self, model: DeepSeekV3) -> None:
        """Replaces the weights by those of a model of the same kind, without copying or compiling anything.

        The engine holds the model's own arrays where it does not keep weights in another form: give it the new ones
        before its next step if they are donated. Pages of finished requests are withdrawn. Running requests keep their
        text; it is read again with the new weights.

        Raises:
          ConfigError: the weights have other names, shapes or dtypes.
        """
        read_by, model = (model, model) if self._sets is None else (on_devices(model, each) for each in self._sets)
        weights = nnx.state(self._own(model, self._load))
        kinds = [jax.tree.map(lambda x: (x.shape, x.dtype), each) for each in (weights, self._weights)]
        if kinds[0] != kinds[1]:
            raise ConfigError("the new weights have other names, shapes or dtypes than the engine's; make a new engine")
        self._weights = weights
        self._scheduler.start_again()
        if self.prefill is not None:
            self.prefill.update(read_by)

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
        steps, outputs = self.config.steps, list[Output]()
        if self.prefill is not None:
            for arrived in self.prefill.step(self._scheduler):
                self._receive(arrived.sequence, arrived.pieces)
            self.statistics.read_tokens = self.prefill.read_tokens
        else:
            for sequence in self._scheduler.admit():
                self._prepare_slot(sequence)
            reading = self._scheduler.to_read(self.sizes.chunk_rows)
            if reading:
                outputs = self._read(reading)
            steps = 1 if self._scheduler.to_read(1) else steps
        rows, steps = self._scheduler.to_write(steps)
        self.statistics.preemptions = self._scheduler.preemptions
        self.statistics.reused_tokens = self.schedulers[0].reused_tokens
        return outputs + (self._write(rows, steps) if rows else [])

    def _prepare_slot(self, sequence: Sequence) -> None:
        request = sequence.request
        if request.sampler.counts_tokens:
            new = sequence.tokens[len(request.prompt) :]
            text = text_of(request.sampler, request.prompt, new, self.model_config.vocab_size)
            self._slots = programs.begin(self._slots, np.int32(sequence.slot), text)

    def _receive(self, sequence: Sequence, pieces: SequenceOf[Piece]) -> None:
        """Takes over a prompt that the prefill set has read."""
        self._pages, self._slots = received(self._devices, self._pages, self._slots, sequence, pieces, self.sizes)
        sequence.read = len(sequence.tokens) - 1
        self._prepare_slot(sequence)

    def _read(self, sequences: list[Sequence]) -> list[Output]:
        """Reads one chunk of each sequence's prompt; returns the scores of prompts that are read now."""
        length, starts = chunk_length(sequences, self.config.chunk_sizes), [sequence.read for sequence in sequences]
        scores = jax.tree.map(np.asarray, self._call_read(sequences, length))
        self.statistics.read_tokens += self._scheduler.have_read(sequences, length)
        outputs = []
        for row, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
            if scores is None or sequence.scores is None:
                continue
            wanted = range(max(start + 1, sequence.request.score_from or 0), sequence.read + 1)
            sequence.scores += [scores.at((row, index - start - 1), 1) for index in wanted]
            if not sequence.is_reading:
                outputs.append(self._scored(sequence, sequence.scores))
        return outputs

    def _scored(self, sequence: Sequence, scores: list[TokenLogprobs]) -> Output:
        """Returns the scores of a prompt; ends the request if nothing is to be written."""
        sequence.scores = None
        finished: FinishReason | None = None if sequence.remaining else "length"
        if finished:
            self._end(sequence)
        return Output(sequence.number, (), (), (), (), "", finished, tuple(scores))

    def _call_read(self, sequences: list[Sequence], length: int) -> Scores | None:
        chunk = chunk_of(sequences, length, self.sizes)
        self._pages, self._slots, scores = programs.read_chunk(
            self._graph,
            self._weights,
            self._pages,
            self._slots,
            chunk,
            scored=self.config.score_prompts,
            micro_batches=self.config.micro_batches,
        )
        return scores

    def _write(self, sequences: list[Sequence], steps: int) -> list[Output]:
        """Gives tokens to the sequences."""
        rows = next(count for count in self.sizes.row_counts if count >= len(sequences))
        written = self._call_write(sequences, rows, steps)
        return [self._output(sequence, written, row) for row, sequence in enumerate(sequences)]

    def _call_write(self, sequences: list[Sequence], rows: int, steps: int) -> programs.Written:
        self._pages, self._slots, written = programs.write_tokens(
            self._graph,
            self._weights,
            self._pages,
            self._slots,
            running_of(sequences, rows, self.sizes),
            np.int32(steps),
            most_steps=self.config.steps,
            top=self.config.top_logprobs,
        )
        return jax.tree.map(np.asarray, written)

    def _output(self, sequence: Sequence, written: programs.Written, row: int) -> Output:
        """Appends what a sequence was given; ends it if that completes it."""
        request = sequence.request
        text = self._texts.get(sequence.number)
        tokens: list[int] = []
        drafted: list[bool] = []
        experts = self._experts_of_prompt(sequence)
        logprobs: list[TokenLogprobs] = []
        pieces: list[str] = []
        finished: FinishReason | None = None
        for step in range(len(written.count)):
            count = int(written.count[step, row])
            if not count or finished:
                break
            sequence.valid = count
            for at in range(count):
                token = int(written.tokens[step, row, at])
                tokens.append(token)
                drafted.append(at < int(written.accepted[step, row]))
                self.statistics.count_draft(at, drafted[-1])
                if written.experts is not None:
                    experts.append(np.asarray(written.experts[step, row, at], np.int32))
                if request.top_logprobs is not None:
                    logprobs.append(written.scores.at((step, row, at), request.top_logprobs))
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
        return Output(
            request_id=sequence.number,
            tokens=tuple(tokens),
            drafted=tuple(drafted),
            experts=tuple(experts),
            logprobs=tuple(logprobs),
            text="".join(pieces),
            finished=finished,
        )

    def _end(self, sequence: Sequence) -> None:
        self._ended += 1
        if self._ended % self.config.requests_per_placement == 0:
            self._weights = self._own.placed_again(self._weights, self._load)
            if self.prefill is not None:
                self.prefill.place_again()
        next(each for each in self.schedulers if sequence in each).remove(sequence)
        del self._sequences[sequence.number]
        self._texts.pop(sequence.number, None)

    def _experts_of_prompt(self, sequence: Sequence) -> list[np.ndarray]:
        """Returns the experts of the prompt's tokens but the last."""
        if self._pages.experts is None or len(sequence.tokens) > len(sequence.request.prompt):
            return []
        recorded = programs.experts_of(self._pages.experts, table_of([sequence], 1, self.sizes)[0])
        return list(np.asarray(recorded, np.int32)[: len(sequence.tokens) - 1])

    def _compile(self, progress: Callable[[int, int, str], None] | None) -> None:
        """Compiles every shape by running it on padding alone."""
        read = self._call_read if self.prefill is None else self.prefill.call_read
        nobody = Sequence(0, Request(prompt=(0,), sampler=Sampler(presence_penalty=1)), [0], slot=0)
        work: list[tuple[str, Callable[[], object]]] = []
        if self.prefill is not None:
            nothing = self.prefill.nothing
            work.append(("handing a prompt over", lambda: self._receive(nobody, [nothing()])))
        work += [
            (f"reading {length} tokens of a prompt", functools.partial(read, [], length))
            for length in self.config.chunk_sizes
        ]
        work += [
            (f"writing tokens of {rows} requests", functools.partial(self._call_write, [], rows, 1))
            for rows in self.sizes.row_counts
        ]
        work.append(("penalties and logit bias", lambda: self._prepare_slot(nobody)))
        if self.config.record_experts:
            work.append(("experts of a prompt", lambda: self._experts_of_prompt(nobody)))
        for number, (what, call) in enumerate(work):
            if progress is not None:
                progress(number, len(work), what)
            call()
