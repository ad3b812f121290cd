"""Checks checkpoints whose experts are fused into two tensors per layer, as transformers 5 has them in memory."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from interop.checkpoints import GOLDEN, fp8_checkpoint, golden_config, raw_tensors, write_checkpoint, write_index

import dsv3_jax as dsv3
from dsv3_jax.errors import UserError
from dsv3_jax.interop.account import take_account
from dsv3_jax.interop.parameter_tree import arrays
from dsv3_jax.interop.published_checkpoint import open_published

NAME = "v3_negative_bias"
Raw = dict[str, tuple[str, tuple[int, ...], bytes]]


def fused(tensors: Raw) -> Raw:
    """Fuses the experts with numpy alone."""
    result: Raw = {}
    layers: dict[str, dict[tuple[int, str, str], tuple[str, tuple[int, ...], bytes]]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.*\.mlp\.experts\.)(\d+)\.(gate|up|down)_proj\.weight(_scale_inv)?", name)
        if match is None:
            result[name] = tensor
        else:
            layers.setdefault(match[1], {})[int(match[2]), match[3], match[4] or ""] = tensor
    for layer, parts in layers.items():
        count = 1 + max(expert for expert, _, _ in parts)
        for suffix in sorted({suffix for _, _, suffix in parts}):
            for target, sources in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
                rows = [parts[expert, source, suffix] for expert in range(count) for source in sources]
                dtype, (height, width), _ = rows[0]
                shape = (count, len(sources) * height, width)
                result[layer + target + suffix] = (dtype, shape, b"".join(data for _, _, data in rows))
    return result


@pytest.mark.parametrize("form", ["float32", "fp8"])
def test_fused_experts_are_those_of_the_separate_form(form: str, tmp_path: Path) -> None:
    separate = GOLDEN / NAME if form == "float32" else fp8_checkpoint(tmp_path / "separate", NAME)
    config = json.loads((separate / "config.json").read_text())
    folder = write_checkpoint(tmp_path / "fused", fused(raw_tensors(separate)), config, shards=2)
    ours, theirs = arrays(dsv3.load_hf(folder)), arrays(dsv3.load_hf(separate))
    assert ours.keys() == theirs.keys()
    for path, value in theirs.items():
        np.testing.assert_array_equal(ours[path], value)


def test_the_index_alone_is_enough_for_an_account(tmp_path: Path) -> None:
    names = fused(raw_tensors(GOLDEN / NAME))
    write_index(tmp_path, dict.fromkeys(names, "a.safetensors"))
    (tmp_path / "config.json").write_text(json.dumps(golden_config(NAME)))
    account = take_account(*open_published(tmp_path, headers=False))
    assert account.tensor_count == len(raw_tensors(GOLDEN / NAME))


def test_another_number_of_experts_is_named(tmp_path: Path) -> None:
    config = golden_config(NAME, n_routed_experts=8)
    folder = write_checkpoint(tmp_path, fused(raw_tensors(GOLDEN / NAME)), config)
    with pytest.raises(UserError, match=r"gate_up_proj' has shape \[16, .*expected \[8, rows, columns\]"):
        dsv3.load_hf(folder)
