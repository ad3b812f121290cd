"""Checks which precision `auto` stands for on which device."""

from __future__ import annotations

import os
import subprocess
import sys
import types

import jax
import pytest

from dsv3_jax.precision import Precision, automatic


@pytest.mark.parametrize(
    ("platform", "capability", "name"),
    [
        ("cpu", None, "float32"),
        ("gpu", "7.5", "float32"),  # T4: its bfloat16 products are emulated
        ("gpu", "8.0", "bfloat16"),
        ("gpu", "9.0", "bfloat16"),
        ("gpu", "12.0", "bfloat16"),
        ("gpu", "gfx942", "bfloat16"),  # AMD
        ("tpu", None, "bfloat16"),
    ],
)
def test_auto(platform: str, capability: str | None, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = types.SimpleNamespace(platform=platform, **({"compute_capability": capability} if capability else {}))
    monkeypatch.setattr(jax, "devices", lambda *_: [device])
    assert Precision.preset("auto").name == name


@pytest.mark.parametrize(
    ("flags", "width", "gain", "name"),
    [
        ({"avx512f", "amx_bf16"}, 128, 4.0, "bfloat16"),
        ({"avx512_bf16"}, 256, 1.2, "float32"),  # the instructions are there, and no faster
        ({"avx512_bf16"}, 32, 4.0, "float32"),  # too narrow
        ({"avx512f"}, 256, 4.0, "float32"),
        (set(), 256, 4.0, "float32"),  # a system that names no flags
    ],
)
def test_a_new_run_on_a_cpu(flags: set[str], width: int, gain: float, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(automatic, "processor_flags", lambda: frozenset(flags))
    monkeypatch.setattr(automatic, "bfloat16_gain", lambda width: gain)
    assert automatic.automatic_recipe(width).name == name


def test_the_gain_of_bfloat16_is_measured():
    assert 0.01 < automatic.bfloat16_gain(64) < 100


@pytest.mark.slow
def test_a_platform_that_is_absent_is_one_line() -> None:
    command = [sys.executable, "-m", "dsv3_jax.cli.main", "generate", "nowhere"]
    environment = os.environ | {"JAX_PLATFORMS": "nonsense"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=100)
    assert ended.returncode == 2
    assert ended.stderr.startswith("dsv3: JAX finds no device")
    assert "JAX_PLATFORMS is 'nonsense'" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
