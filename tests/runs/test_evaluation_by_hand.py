"""Checks the numbers of a run that users see: bits per byte, drafts accepted, MFU and loads, each counted by hand."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.axes import Axes
from small_models import small_model
from small_runs import LENGTH, VOCABULARY, small_run

from dsv3_jax.runs import reporter
from dsv3_jax.runs.evaluation import Evaluation, HeadResult, evaluate
from dsv3_jax.runs.folder import RunFolder
from dsv3_jax.runs.hardware import peak_flops
from dsv3_jax.runs.metrics import read_metrics
from dsv3_jax.runs.plots import _smooth, plot_expert_load
from dsv3_jax.runs.results import write_results
from dsv3_jax.runs.saved_run import RunPosition
from dsv3_jax.training.evaluation_step import make_evaluation_step
from dsv3_jax.training.state import split_model
from dsv3_jax.training.step import StepMetrics

ROWS = 5  # of which the last pass of two has one


@pytest.fixture(scope="module")
def validation() -> Any:
    """Returns rows that end in padding of different lengths, with documents inside, and the bytes of every token."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, VOCABULARY, (ROWS, LENGTH + 1)).astype(np.int32)
    segments = np.sort(random.integers(1, 4, tokens.shape), axis=1).astype(np.int32)
    for row, end in enumerate((LENGTH + 1, 9, 20, 2, 30)):
        segments[row, end:] = 0
    token_bytes = random.integers(0, 5, VOCABULARY)
    return SimpleNamespace(
        config=small_run().data,
        tokenizer=SimpleNamespace(token_bytes=token_bytes),
        validation_rows=lambda: (tokens, segments),
        validation_entropy_bits_per_byte=4.5,
        validation_gzip_bits_per_byte=2.25,
    )


@pytest.fixture(scope="module")
def model() -> Any:
    """Returns a model whose heads often agree: few tokens have logits above zero."""
    found = small_model(small_run().model, 0)
    rows = np.random.default_rng(1).standard_normal(found.head.weight.shape).astype(np.float32)
    found.head.weight[...] = jnp.asarray(rows * (np.arange(VOCABULARY) < 5)[:, None])
    return found


def by_hand(model: Any, validation: Any) -> tuple[list[tuple[float, float]], float]:
    """Returns nats per token and bits per byte of both heads, and the share of drafts that the main head accepts."""
    tokens, segments = validation.validation_rows()
    out = model(jnp.asarray(tokens[:, :-1]), segment_ids=None)
    heads = [np.asarray(logits, np.float64) for logits in (out.logits, *out.mtp_logits)]
    results, agreed = [], []
    for depth, logits in enumerate(heads):
        nats, size = [], 0
        for row in range(ROWS):
            for i in range(LENGTH - depth):
                target = tokens[row, i + depth + 1]
                if segments[row, i + depth + 1] == 0:
                    continue
                scores = logits[row, i]
                nats.append(np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[target])
                size += int(validation.tokenizer.token_bytes[target])
                if depth:
                    agreed.append(scores.argmax() == heads[0][row, i + depth].argmax())
        results.append((float(np.mean(nats)), sum(nats) / math.log(2) / size))
    return results, float(np.mean(agreed))


def test_losses_bits_per_byte_and_drafts(model: Any, validation: Any) -> None:
    """Padding counts nowhere, not that of the rows and not that of the last pass."""
    skeleton, params, biases = split_model(model)
    config = small_run()
    found = evaluate(make_evaluation_step(skeleton, config), params, biases, validation, batch_size=2)
    assert isinstance(found, Evaluation)
    results, accepted = by_hand(model, validation)
    assert 0.2 < accepted < 0.9
    for head, (nats, bits) in zip((found.main, *found.mtp), results, strict=True):
        assert head.loss == pytest.approx(nats, rel=1e-5)
        assert head.bits_per_byte == pytest.approx(bits, rel=1e-5)
    assert found.mtp_acceptance == pytest.approx((accepted,))
    assert (found.text_entropy, found.text_gzip) == (4.5, 2.25)


RESULT = Evaluation(HeadResult(2.0, 1.5), (HeadResult(3.0, 2.25),), (0.125,), 4.5, 2.25)


def test_results_as_text() -> None:
    text = RESULT.describe()
    assert text == (
        "validation loss 2.0000, 1.5000 bits per byte; MTP loss 3.0000, 2.2500 bits per byte, 12.5% of drafts accepted"
    )
    assert "unigram bytes 4.5000, gzip 2.2500 bits per byte" in RESULT.describe_baselines()


def test_summary_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end and the start are not confused, and layers are named from the first that has experts."""
    config = small_run()
    config = dataclasses.replace(config, model=config.model.replace(num_hidden_layers=4, first_k_dense_replace=1))
    names: list[list[str]] = []
    monkeypatch.setattr("dsv3_jax.runs.results.plot_losses", lambda *_: None)
    monkeypatch.setattr("dsv3_jax.runs.results.plot_expert_load", lambda *given: names.append(given[2]))
    start = dataclasses.asdict(dataclasses.replace(RESULT, main=HeadResult(5.0, 4.0)))
    position = RunPosition(step=7, tokens=448, data={}, validation_at_start=start)
    folder = RunFolder(tmp_path)
    write_results(folder, config, position, np.ones((4, 8), int), RESULT)
    summary = json.loads(folder.summary.read_text())
    assert (summary["steps"], summary["tokens"]) == (7, 448)
    assert summary["validation"]["main"] == {"loss": 2.0, "bits_per_byte": 1.5}
    assert summary["validation_at_start"]["main"] == {"loss": 5.0, "bits_per_byte": 4.0}
    assert names == [["layer 1", "layer 2", "layer 3", "MTP"]]


def test_records_of_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MFU is over all devices; MTP's loss is the mean of the depths; loads are summed over the last twenty steps."""
    config = small_run()
    monkeypatch.setattr(reporter, "peak_flops", lambda _: 1e9)
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    monkeypatch.setattr(reporter, "count_flops", lambda *_: SimpleNamespace(training_with_mtp=2e6))
    writing = reporter.Reporter(RunFolder(tmp_path), config, 0)
    assert writing.recent_load is None
    numbers = {field.name: np.zeros(()) for field in dataclasses.fields(StepMetrics)}
    values = SimpleNamespace(learning_rate=0.5, batch_size=4)
    for step in range(1, 24):
        now = numbers | {
            "main_loss": np.float32(step),
            "mtp_loss": np.array([1.0, 4.0]),
            "max_violation": np.float32(0.75),
            "load": np.array([[step, 1]]),
            "applied": np.bool_(True),
        }
        writing.report_step(RunPosition(step, 128 * step, {}), StepMetrics(**now), values, 100.0)  # pyright: ignore
    np.testing.assert_array_equal(writing.recent_load, [[sum(range(4, 24)), 20]])
    writing.close()
    records = read_metrics(RunFolder(tmp_path).metrics)
    assert [record["main_loss"] for record in records] == list(range(1, 24))
    last = records[-1]
    assert (last["mtp_loss"], last["max_violation"], last["tokens"]) == (2.5, 0.75, 128 * 23)
    assert last["mfu"] == pytest.approx(100.0 * 2e6 / (4 * 1e9))


def test_records_of_evaluations(tmp_path: Path) -> None:
    """Losses, bits per byte and accepted drafts stand each under its own name."""
    config = small_run()
    writing = reporter.Reporter(RunFolder(tmp_path), config, 0)
    last = config.training.steps
    writing.report_evaluation(last, RESULT, first=False)
    writing.close()
    (record,) = read_metrics(RunFolder(tmp_path).metrics)
    assert record == {
        "step": last,
        "validation_loss": 2.0,
        "validation_bits_per_byte": 1.5,
        "validation_mtp_loss": 3.0,
        "mtp_acceptance": 0.125,
    }


def test_smoothed_curves_follow_slowly() -> None:
    """Nine tenths of the curve so far, one tenth of the new value, from the first value on."""
    np.testing.assert_allclose(_smooth(np.array([2.0, 2.0, 12.0, 3.0])), [2.0, 2.0, 3.0, 3.0])


def test_the_picture_of_the_load_is_relative_to_each_layers_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[np.ndarray] = []
    exact = Axes.imshow

    def imshow(self: Axes, values: Any, **options: Any) -> Any:
        drawn.append(np.asarray(values))
        return exact(self, values, **options)

    monkeypatch.setattr(Axes, "imshow", imshow)
    load = np.array([[1, 2, 3], [40, 40, 40]])
    plot_expert_load([{"step": 1, "max_violation": 0.5}], load, ["a", "b"], tmp_path / "load.png", "title")
    np.testing.assert_allclose(drawn[0], [[0.5, 1.0, 1.5], [1.0, 1.0, 1.0]])


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H800", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("cpu", None),
    ],
)
def test_peaks_of_devices(kind: str, peak: float | None) -> None:
    assert peak_flops(SimpleNamespace(device_kind=kind)) == peak  # pyright: ignore[reportArgumentType]
