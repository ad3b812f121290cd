"""Checks the loss over packed samples of which only some tokens are learned, against each sample computed alone."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from simulated import run_simulated
from small_models import small_model
from small_runs import packed_batch, small_run
from test_mesh_axes_alone import check_equal

from dsv3_jax.modules.segments import positions_in_segments
from dsv3_jax.training.losses import BatchTargets, LossWeights, objective

_SCRIPT = Path(__file__).with_name("simulated_training.py")


def test_positions_start_again_in_each_segment():
    ids = jnp.array([[-1, -1, 1, 2, 2, 0, 0], [-1, 2, -3, 3, 3, -4, 4]])
    assert positions_in_segments(ids).tolist() == [[0, 1, 2, 0, 1, 0, 1], [0, 0, 0, 1, 2, 0, 1]]


def test_loss_is_that_of_each_samples_answer_computed_alone():
    """Samples are padded at the end, where nothing that is counted sees the padding, so that they compile once."""
    config = small_run()
    model = small_model(config.model, 3)
    tokens, segments = (np.asarray(array[0]) for array in packed_batch(0, 1, 3))
    sums, counts = np.zeros(2), np.zeros(2)

    @jax.jit
    def log_probabilities(tokens):
        out = model(tokens)
        return [jax.nn.log_softmax(logits) for logits in (out.logits, *out.mtp_logits)]

    for row, ids in zip(tokens, segments, strict=True):
        for sample in range(1, abs(ids).max() + 1):
            own = row[abs(ids) == sample]
            learned = ids[abs(ids) == sample] > 0
            padded = np.pad(own, (0, tokens.shape[1] - len(own)))[None]
            for k, logs in enumerate(log_probabilities(padded), start=1):
                for at in range(len(own) - k):
                    if learned[at + k]:
                        sums[k - 1] -= float(logs[0, at, own[at + k]])
                        counts[k - 1] += 1
    terms = jax.jit(
        lambda tokens, segments: objective(
            model,
            tokens,
            segments,
            weights=LossWeights(balance=jnp.float32(0), mtp=jnp.float32(0)),
            targets=BatchTargets.count(segments, 1, isolate_segments=True),
            balance="none",
            isolate_segments=True,
            chunk=4096,
        )
    )(tokens, segments)
    assert counts[0] > 20
    np.testing.assert_allclose([terms.main, terms.mtp[0]], sums / counts, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "mesh"), [("masked-with_mtp", "fsdp=2,expert=2"), ("masked-staged", "stage=2,data=2")]
)
def test_step_on_a_mesh_equals_one_device(kind: str, mesh: str):
    check_equal(run_simulated(_SCRIPT, kind, mesh)[mesh])
