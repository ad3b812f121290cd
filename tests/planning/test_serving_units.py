"""Checks the plans of serving units against hand calculations, the report's layout and published figures."""

from __future__ import annotations

import dataclasses
import json

import pytest

from dsv3_jax.cli import plan as command
from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import ConfigError, UserError
from dsv3_jax.planning.hardware import Target
from dsv3_jax.planning.serving import ServingUnit, estimate
from dsv3_jax.planning.serving_table import PUBLISHED, report_unit

V3 = ModelConfig.preset("v3-671b")
PREFILL = report_unit("prefill", V3, Target.parse("h800:32"))
DECODE = report_unit("decode", V3, Target.parse("h800:320"))


def test_experts_are_spread_as_in_the_report() -> None:
    """Section 3.4: 32 redundant experts and 9 of a prefill device; in decoding one of a device, 64 devices more."""
    assert (PREFILL.redundant, PREFILL.experts_per_device) == (32, 9)
    assert (DECODE.redundant, DECODE.experts_per_device) == (64, 1)


def test_weights_of_a_device() -> None:
    """671B parameters in FP8 over 32 devices, 9 experts of 44 million in 58 layers, and what is not spread."""
    experts = 58 * (9 + 1) * 3 * 7168 * 2048
    dense = 3 * 3 * 7168 * 18432
    outer = 2 * (2 * 129280 * 7168 / 4 + 58 * 256 * 7169)
    attention = 61 * 187.1e6 / 4
    assert estimate(PREFILL).weights == pytest.approx(experts + dense + outer + attention, rel=0.01)
    with pytest.raises(ConfigError, match="more devices"):
        estimate(dataclasses.replace(PREFILL, target=Target.parse("h800:4")))


def test_the_cache_of_a_token_takes_70_kilobytes() -> None:
    result = estimate(PREFILL)
    free = 0.9 * 80 * 2**30 - result.weights
    assert result.cache_tokens == int(free / (61 * 576 * 2))


def test_times_by_hand() -> None:
    """A decode device with one request and no tensor group: its weights are read once, its cache once."""
    unit = dataclasses.replace(DECODE, tensor=1, batch=1)
    result = estimate(unit)
    bandwidth = 0.9 * 3.35e12
    assert result.seconds["products"] == pytest.approx(result.weights / bandwidth)
    flops = 61 * 2 * 128 * (2 * 512 + 64) * unit.context / (0.78 * 989e12)
    assert result.seconds["attention"] == pytest.approx(max(unit.context * 61 * 576 * 2 / bandwidth, flops))
    assert result.seconds["network"] == pytest.approx(58 * 3 * 7168 * 8 * 39 / 40 / 50e9)
    assert estimate(dataclasses.replace(unit, batch=2)).seconds["network"] == pytest.approx(
        2 * result.seconds["network"]
    )


def test_estimates_are_near_the_published_service() -> None:
    """The service computed 43.7 % of its prompts' tokens; an estimate without latencies and imbalance is above it."""
    prefill, decode = (8 * estimate(unit).tokens_per_second for unit in (PREFILL, DECODE))
    assert 0.437 * PUBLISHED["prefill"] < prefill < 3 * PUBLISHED["prefill"]
    assert 0.5 * PUBLISHED["decode"] < decode < 3 * PUBLISHED["decode"]
    assert estimate(DECODE).cache_needed <= estimate(DECODE).cache_tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"tensor": 3}, "must divide"), ({"batch": 0}, "at least 1"), ({"tensor": 160}, "heads")],
)
def test_impossible_units_are_refused(changes: dict[str, int], message: str) -> None:
    values = {"config": V3, "target": Target.parse("h800:320"), "phase": "decode", "batch": 8, "context": 4096}
    with pytest.raises(ConfigError, match=message):
        ServingUnit(**values | changes)


def test_the_command_prints_the_plan(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    assert command.main(["--serve", "decode", "--target", "h800:320", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "published, 8 H800s" in printed
    assert "14,800" in printed
    assert (tmp_path / "plan.txt").read_text() == printed
    assert command.main(["--serve=prefill", "--target=h800:32", "--mesh=tensor=1", "--json", "--batch-size=4096"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["tensor"], values["batch"], values["devices"]) == (1, 4096, 32)
    for wrong, message in (("--mesh=expert=8", "tensor=N"), ("--search=3", "--search is for plans of training")):
        with pytest.raises(UserError, match=message):
            command.main(["--serve=prefill", "--target=h800:32", wrong])
