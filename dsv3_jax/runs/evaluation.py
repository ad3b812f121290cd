"""Validation: loss and bits per byte of the main and MTP heads, and how often MTP drafts would be accepted."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dsv3_jax.data import Data, prepare_data
from dsv3_jax.runs.checkpoints import load_checkpoint
from dsv3_jax.training.state_layout import StateLayout
from dsv3_jax.runs.folder import RunFolder
from dsv3_jax.training.state import split_model
from dsv3_jax.training.step import EvaluationSums, make_evaluation_step


@dataclasses.dataclass(frozen=True)
class HeadResult:
    """One head on the validation text."""

    loss: float  # nats a token
    bits_per_byte: float


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A model on the validation text.

    Attributes:
      main: the main head.   mtp: one result a depth.
      mtp_acceptance: a depth: share of positions where the MTP head's first choice is what the main head, one token
        later, chooses too: the drafts that greedy self-speculation would accept.
      text_entropy, text_gzip: bits a byte of the same text by its byte frequencies alone, and by gzip.
    """

    main: HeadResult
    mtp: tuple[HeadResult, ...]
    mtp_acceptance: tuple[float, ...]
    text_entropy: float
    text_gzip: float

    def describe(self) -> str:
        """One line for people."""
        parts = [f"validation loss {self.main.loss:.4f}, {self.main.bits_per_byte:.4f} bits per byte"]
        for depth, (result, accepted) in enumerate(zip(self.mtp, self.mtp_acceptance, strict=True), start=1):
            name = "MTP" if len(self.mtp) == 1 else f"MTP {depth}"
            parts.append(
                f"{name} loss {result.loss:.4f}, {result.bits_per_byte:.4f} bits per byte, "
                f"{accepted:.1%} of drafts accepted"
            )
        return "; ".join(parts)


def evaluate(
    step: Callable[..., EvaluationSums],
    params: nnx.State,
    biases: Float[Array, "layers E"],
    data: Data,
    batch_size: int,
    *,
    layout: StateLayout | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Runs the whole validation set; None when `stop` said so on the way.

    Args:
      step: of `make_evaluation_step`.
      batch_size: rows a pass; the last pass is filled up with padding.
      layout: the one that `step` was made for.
    """
    tokens, segment_ids = data.validation_rows()
    token_bytes = np.asarray(data.tokenizer.token_bytes, np.int32)
    feeding = (layout or StateLayout()).feed
    sums: list[EvaluationSums] = []
    for start in range(0, len(tokens), batch_size):
        if stop():
            return None
        rows = [array[start : start + batch_size] for array in (tokens, segment_ids)]
        missing = batch_size - len(rows[0])
        padded = [feeding.put_from_whole(np.pad(array, ((0, missing), (0, 0)))) for array in rows]
        sums.append(jax.device_get(step(params, biases, *padded, token_bytes)))
    total = jax.tree.map(lambda *parts: np.sum(np.asarray(parts, np.float64), axis=0), *sums)
    results = [
        HeadResult(loss=float(nats / targets), bits_per_byte=float(nats / math.log(2) / size))
        for nats, targets, size in zip(total.nats, total.targets, total.bytes, strict=True)
    ]
    return Evaluation(
        main=results[0],
        mtp=tuple(results[1:]),
        mtp_acceptance=tuple(float(part) for part in total.accepted[1:] / total.targets[1:]),
        text_entropy=data.validation_entropy_bits_per_byte,
        text_gzip=data.validation_gzip_bits_per_byte,
    )


def evaluate_run(path: Path) -> tuple[int, Evaluation]:
    """Step and validation of the newest whole checkpoint of a run.

    Raises:
      UserError: no run, no whole checkpoint, or its data is gone or has changed.
    """
    folder = RunFolder(path)
    config = folder.read_config()
    model, _, step = load_checkpoint(path)
    data = prepare_data(config.data, folder.cache, tokenizer_folder=folder.tokenizer)
    skeleton, params, biases = split_model(model)
    evaluation_step = make_evaluation_step(skeleton, config)
    result = evaluate(evaluation_step, params, biases, data, config.training.rows_per_pass)
    assert result is not None
    return step, result
