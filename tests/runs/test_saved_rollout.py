"""Checks rollouts as bytes, as files, and put together from those of several processes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.post_training.rejection import Completion
from dsv3_jax.post_training.rollouts import HeldOut, Rollout, joined_rollouts
from dsv3_jax.post_training.tasks import Problem
from dsv3_jax.runs.saved_rollout import read_rollout, rollout_from_bytes, rollout_to_bytes, write_rollout
from dsv3_jax.runs.saved_run import DamagedCheckpoint


def rollout(problems: int, *, experts: bool, seed: int = 0) -> Rollout:
    """Returns a rollout of random completions of two layers and three experts a token."""
    random = np.random.default_rng(seed)
    prompts = [tuple(random.integers(0, 99, 1 + number % 3).tolist()) for number in range(problems)]

    def completion(prompt: tuple[int, ...]) -> Completion:
        ids = tuple(random.integers(0, 99, int(random.integers(1, 6))).tolist())
        read = len(prompt) + len(ids) - 1
        chosen = tuple(random.integers(0, 300, (read, 2, 3)).astype(np.int32)) if experts else ()
        scores = {"reward": float(random.random()), "é": 0.5}
        return Completion("é数", ids, tuple(random.normal(size=len(ids)).tolist()), chosen, bool(len(ids) % 2), scores)

    groups = tuple(tuple(completion(prompt) for _ in range(2)) for prompt in prompts)
    asked = tuple(Problem(f"{number} = ", str(number), "numeric") for number in range(problems))
    return Rollout(asked, tuple(prompts), groups, 0.25, 1.5, 0.5)


def assert_equal(found: Rollout, want: Rollout) -> None:
    assert found == want  # of everything but the experts
    for one, other in zip(found.completions, want.completions, strict=True):
        assert len(one.experts) == len(other.experts)
        assert all((a == b).all() and a.dtype == np.int32 for a, b in zip(one.experts, other.experts, strict=True))


@pytest.mark.parametrize("experts", [False, True])
def test_nothing_is_lost(experts: bool, tmp_path: Path) -> None:
    want = rollout(4, experts=experts)
    assert_equal(rollout_from_bytes(rollout_to_bytes(want)), want)
    write_rollout(tmp_path, want)
    found = read_rollout(tmp_path)
    assert found is not None
    assert_equal(found, want)
    (tmp_path / "rollout.json").write_text('{"prompts": [[1]], "groups": []}')
    with pytest.raises(DamagedCheckpoint):
        read_rollout(tmp_path)


def test_parts_of_a_step_are_one_rollout_in_their_order() -> None:
    want = rollout(6, experts=True)
    parts = [
        dataclasses.replace(
            want,
            problems=want.problems[first : first + 2],
            prompts=want.prompts[first : first + 2],
            groups=want.groups[first : first + 2],
            seconds_drawing=seconds,
        )
        for first, seconds in ((0, 0.5), (2, 1.5), (4, 1.0))
    ]
    assert_equal(joined_rollouts(parts), want)
    assert HeldOut(1, 10, 2) + HeldOut(2, 8, 4) == HeldOut(3, 18, 6)
    assert (HeldOut(3, 18, 6).accuracy, HeldOut(3, 18, 6).length) == (0.5, 3.0)
