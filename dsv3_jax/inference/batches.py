"""The arrays that the engine's programs read: chunks of prompts and running requests, made on the host."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np

from dsv3_jax.inference.engine_config import Sizes
from dsv3_jax.inference.programs import Chunk, Running
from dsv3_jax.inference.requests import MOST_STOP_TOKENS
from dsv3_jax.inference.sampling import GREEDY, Sampler, SamplerRows, TextSoFar
from dsv3_jax.inference.scheduler import Sequence


def chunk_length(sequences: SequenceOf[Sequence], lengths: SequenceOf[int]) -> int:
    """Returns the least of `lengths` with which all sequences are read to their end, or the largest."""
    missing = max(len(sequence.tokens) - 1 - sequence.read for sequence in sequences)
    return next((length for length in lengths if length >= missing), lengths[-1])


def chunk_of(sequences: SequenceOf[Sequence], length: int, sizes: Sizes) -> Chunk:
    """Returns the next `length` tokens, or fewer, of each sequence's prompt; rows without a sequence are padding."""
    rows = sizes.chunk_rows
    arrays: dict[str, Any] = {
        "tokens": np.zeros((rows, length), np.int32),
        "next_tokens": np.zeros((rows, length), np.int32),
        "positions": np.full((rows, length), -1, np.int32),
        "wants_logprobs": np.zeros(rows, bool),
        **_places(sequences, rows, sizes),
    }
    for row, sequence in enumerate(sequences):
        start, stop = sequence.read, min(sequence.read + length, len(sequence.tokens) - 1)
        arrays["tokens"][row, : stop - start] = sequence.tokens[start:stop]
        arrays["next_tokens"][row, : stop - start] = sequence.tokens[start + 1 : stop + 1]
        arrays["positions"][row, : stop - start] = range(start, stop)
        arrays["wants_logprobs"][row] = sequence.request.score_from is not None
    return Chunk(**arrays)


def running_of(sequences: SequenceOf[Sequence], rows: int, sizes: Sizes) -> Running:
    """Returns the state of the sequences, filled up with padding to that many rows."""
    width = 1 + sizes.drafts
    padding = rows - len(sequences)
    samplers = [sequence.request.sampler for sequence in sequences] + [GREEDY] * padding
    seeds = [sequence.request.seed for sequence in sequences] + [0] * padding
    arrays: dict[str, Any] = {
        "tokens": np.zeros((rows, width), np.int32),
        "valid": np.zeros(rows, np.int32),
        "position": np.zeros(rows, np.int32),
        "remaining": np.zeros(rows, np.int32),
        "stop_tokens": np.full((rows, MOST_STOP_TOKENS), -1, np.int32),
        "wants_logprobs": np.zeros(rows, bool),
        "sampler": SamplerRows.of(samplers, seeds),
        **_places(sequences, rows, sizes),
    }
    for row, sequence in enumerate(sequences):
        request, last = sequence.request, sequence.tokens[-width:]
        arrays["tokens"][row, width - len(last) :] = last
        arrays["valid"][row] = sequence.valid
        arrays["position"][row] = len(sequence.tokens) - 1
        arrays["remaining"][row] = sequence.remaining
        arrays["stop_tokens"][row, : len(request.stop_tokens)] = request.stop_tokens
        arrays["wants_logprobs"][row] = request.top_logprobs is not None
    return Running(**arrays)


def text_of(sampler: Sampler, prompt: SequenceOf[int], new: SequenceOf[int], vocabulary: int) -> TextSoFar:
    """Returns what penalties and logit bias need of one request's text, without a batch axis."""
    in_prompt = np.zeros(vocabulary, bool)
    in_prompt[list(prompt)] = True
    bias = np.zeros(vocabulary, np.float32)
    for token, value in sampler.logit_bias:
        bias[token] += value
    count = np.bincount(np.asarray(new, np.int64), minlength=vocabulary).astype(np.int32)
    arrays: dict[str, Any] = {"in_prompt": in_prompt, "count": count, "bias": bias}
    return TextSoFar(**arrays)


def table_of(sequences: SequenceOf[Sequence], rows: int, sizes: Sizes) -> np.ndarray:
    """Returns the pages of each sequence, int32 [rows, table_width]; the number of pages where it has none."""
    table = np.full((rows, sizes.table_width), sizes.pages, np.int32)
    for row, sequence in enumerate(sequences):
        table[row, : len(sequence.pages)] = sequence.pages
    return table


def _places(sequences: SequenceOf[Sequence], rows: int, sizes: Sizes) -> dict[str, np.ndarray]:
    slot = np.full(rows, sizes.slots, np.int32)
    slot[: len(sequences)] = [sequence.slot for sequence in sequences]
    return {"table": table_of(sequences, rows, sizes), "slot": slot}
