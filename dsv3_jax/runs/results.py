"""The pictures and the summary of a complete run."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
from jaxtyping import Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.runs.evaluation import Evaluation, PairEvaluation
from dsv3_jax.runs.folder import RunFolder, write_atomically
from dsv3_jax.runs.metrics import read_metrics
from dsv3_jax.runs.plots import plot_expert_load, plot_losses
from dsv3_jax.runs.saved_run import RunPosition
from dsv3_jax.training.config import RunConfig


def write_results(
    folder: RunFolder,
    config: RunConfig,
    position: RunPosition,
    load: Int[np.ndarray, "layers E"] | None,
    end: Evaluation | PairEvaluation,
) -> None:
    """Writes loss.png, expert_load.png and summary.json.

    Args:
      load: tokens sent to each expert over the last steps; None where there is nothing to show.
      end: the result on the validation set at the end of the run.
    """
    records = read_metrics(folder.metrics)
    title = f"{config.preset}, {position.tokens:,} tokens"
    plot_losses(records, folder.loss_plot, title)
    if load is not None:
        plot_expert_load(records, load, _layer_names(config.model), folder.load_plot, title)
    summary = {
        "steps": position.step,
        "tokens": position.tokens,
        "validation": dataclasses.asdict(end),
        "validation_at_start": position.validation_at_start,
    }
    write_atomically(folder.summary, json.dumps(summary, indent=1) + "\n")


def _layer_names(model: ModelConfig) -> list[str]:
    """Returns the names of the layers with experts, in the order of their loads."""
    names = [f"layer {index}" for index in range(model.num_dense_layers, model.num_hidden_layers)]
    depth = model.num_nextn_predict_layers
    return names + [f"MTP {k}" if depth > 1 else "MTP" for k in range(1, depth + 1)]
