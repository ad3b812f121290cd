"""Fixtures of the tests of commands."""

from __future__ import annotations

import pytest


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> list:
    """Replaces training by a function that collects the configurations it is called with."""
    calls: list = []

    def train(config, out, *, initial_model=None, peers=None):
        from dsv3_jax.runs.loop import Outcome

        calls.append((config, out))
        return Outcome(0)

    monkeypatch.setattr("dsv3_jax.runs.loop.train", train)
    return calls
