"""Evaluation on the validation set: loss, bits per byte, and how often drafts of the MTP module would be accepted."""

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
from dsv3_jax.runs.checkpoints import LoadedRun, load_run
from dsv3_jax.runs.folder import RunFolder
from dsv3_jax.training.evaluation_step import EvaluationSums, make_evaluation_step
from dsv3_jax.training.state import split_model
from dsv3_jax.training.state_layout import StateLayout


@dataclasses.dataclass(frozen=True)
class HeadResult:
    """The result of one output head on the validation set."""

    loss: float  # mean cross-entropy, nats per token
    bits_per_byte: float  # the same loss in bits per byte of text


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result of a model on the validation set.

    Attributes:
      main: result of the main head.
      mtp: results of the MTP heads, one per depth.
      mtp_acceptance: per depth, the fraction of positions where the MTP head's most likely token is also the main
        head's, one token later. These are the drafts that greedy self-speculation would accept.
      text_entropy: baseline, bits per byte of a code that knows only how frequent each byte is.
      text_gzip: baseline, bits per byte of the text compressed by gzip.
    """

    main: HeadResult
    mtp: tuple[HeadResult, ...]
    mtp_acceptance: tuple[float, ...]
    text_entropy: float
    text_gzip: float

    def describe(self) -> str:
        """Returns the result as one line of text."""
        parts = [f"validation loss {self.main.loss:.4f}, {self.main.bits_per_byte:.4f} bits per byte"]
        for depth, (result, accepted) in enumerate(zip(self.mtp, self.mtp_acceptance, strict=True), start=1):
            name = "MTP" if len(self.mtp) == 1 else f"MTP {depth}"
            parts.append(
                f"{name} loss {result.loss:.4f}, {result.bits_per_byte:.4f} bits per byte, "
                f"{accepted:.1%} of drafts accepted"
            )
        return "; ".join(parts)

    def describe_baselines(self) -> str:
        """Returns what the bits per byte can be compared with, as one line of text."""
        return (
            f"baselines on the validation text: unigram bytes {self.text_entropy:.4f}, gzip {self.text_gzip:.4f} "
            "bits per byte (lower is better)"
        )

    def numbers(self) -> dict[str, float]:
        """Returns what metrics.jsonl records of it."""
        found = {"validation_loss": self.main.loss, "validation_bits_per_byte": self.main.bits_per_byte}
        if self.mtp:
            found |= {"validation_mtp_loss": self.mtp[0].loss, "mtp_acceptance": self.mtp_acceptance[0]}
        return found


@dataclasses.dataclass(frozen=True)
class PairEvaluation:
    """The result of a reward model on held-out preference pairs.

    Attributes:
      loss: mean of -log sigmoid(r(chosen) - r(rejected)), in nats.
      accuracy: share of the pairs whose chosen answer has the higher score.
      pairs: number of pairs.
    """

    loss: float
    accuracy: float
    pairs: int

    def describe(self) -> str:
        """Returns the result as one line of text."""
        return (
            f"validation loss {self.loss:.4f}, {self.accuracy:.1%} of {self.pairs} held-out pairs are ordered rightly"
        )

    def describe_baselines(self) -> str:
        """Returns what the result can be compared with, as one line of text."""
        return f"baseline: equal scores have a loss of {math.log(2):.4f}"

    def numbers(self) -> dict[str, float]:
        """Returns what metrics.jsonl records of it."""
        return {"validation_loss": self.loss, "validation_accuracy": self.accuracy}


def evaluate(
    step: Callable[..., EvaluationSums],
    params: nnx.State,
    biases: Float[Array, "layers E"],
    data: Data,
    batch_size: int,
    *,
    layout: StateLayout | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation | PairEvaluation | None:
    """Evaluates a model on the whole validation set.

    Args:
      step: made by `make_evaluation_step`.
      params: the model's parameters.
      biases: the model's router biases.
      batch_size: rows per pass; the last pass is filled up with padding.
      layout: the layout that `step` was made for; one device if not given.
      stop: is asked before each pass whether to stop.

    Returns:
      The result, or None where `stop` returned True.
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
    if data.config.form == "preferences":
        pairs = total.targets[0]
        return PairEvaluation(float(total.nats[0] / pairs), float(total.accepted[0] / pairs), int(pairs))
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


def evaluate_loaded(loaded: LoadedRun, data: Data) -> Evaluation | PairEvaluation:
    """Evaluates a loaded run on the validation set of its data, or of others."""
    config = loaded.saved.config
    skeleton, params, biases = split_model(loaded.model)
    evaluation_step = make_evaluation_step(skeleton, config)
    result = evaluate(evaluation_step, params, biases, data, config.training.rows_per_pass)
    assert result is not None
    return result


def load_run_with_data(
    path: Path, corpus: str | None = None, *, step: int | None = None, dtype: str | None = None
) -> tuple[LoadedRun, Data]:
    """Returns a checkpoint of a run, and the run's corpus or another, tokenised by its tokenizer.

    Raises:
      UserError: the folder holds no run or no checkpoint that can be used, or the corpus is missing or has changed.
    """
    loaded = load_run(path, step=step, dtype=dtype)
    saved = loaded.saved
    imported = not saved.position.data  # and not trained here, so that it has seen no data of ours
    if corpus is not None:
        config = dataclasses.replace(saved.config.data, corpus=corpus, fill_in_middle_rate=0.0)
        data = prepare_data(config, None, tokenizer=saved.tokenizer)
    else:
        data = prepare_data(saved.config.data, RunFolder(path).cache, tokenizer=saved.tokenizer)
        if not imported:
            data.train_iterator().set_state(saved.position.data)
    return loaded, dataclasses.replace(data, begins_rows=imported and saved.tokenizer.adds_bos)
