"""Checks meshes, and how parameters are sharded on them."""

from __future__ import annotations

import math

import jax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec

from dsv3_jax.config import ModelConfig
from dsv3_jax.counts import count_parameters
from dsv3_jax.errors import ConfigError
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.sharding.mesh import AXES, MeshConfig
from dsv3_jax.sharding.rules import ZERO, AxisRules, parameter_specs

V3 = ModelConfig.preset("v3-671b")


def test_parse_and_resolve() -> None:
    mesh = MeshConfig.parse("stage=16, expert=64,data=-1")
    assert mesh == MeshConfig(stage=16, data=-1, expert=64)
    assert mesh.resolve(2048) == MeshConfig(stage=16, data=2, expert=64)


@pytest.mark.parametrize(
    "text",
    ["expert=x", "experts=2", "expert=0", "fsdp=-1,data=-1", "fsdp=2,fsdp=4", "stage", "stage=2,context=2"],
)
def test_what_is_no_mesh(text: str) -> None:
    with pytest.raises(ConfigError, match="mesh"):
        MeshConfig.parse(text)


@pytest.mark.parametrize(
    ("mesh", "batch", "message"),
    [
        (MeshConfig(expert=7), 7, r"mesh.expert \(7\) .* 4 and 8"),
        (MeshConfig(tensor=3), 8, r"mesh.tensor \(3\) .* 2 and 4"),
        (MeshConfig(stage=62), 8, "mesh.stage"),
        (MeshConfig(context=3), 8, r"mesh.context \(3\) .* heads .* \(128\).* 2 and 4"),
        (MeshConfig(context=64, tensor=4), 8, r"mesh.context \(64\) .* \(32\).* 16 and 32"),
        (MeshConfig(context=8), 8, r"mesh.context \(8\) .* sequence length \(4100\)"),
        (MeshConfig(data=4, expert=2), 12, "such as 8 or 16"),
    ],
)
def test_what_does_not_divide(mesh: MeshConfig, batch: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        mesh.check(V3, batch, sequence_length=4100)


@pytest.mark.parametrize(
    ("text", "devices", "message"),
    [
        ("expert=3,fsdp=-1", 8, "a multiple of 3 devices, but there are 8; expert=2 or expert=4 would do"),
        ("data=2,expert=3", 8, "6 devices, but there are 8; expert=4 would do"),
        ("fsdp=3,expert=5", 8, "15 devices, but there are 8$"),
    ],
)
def test_what_does_not_make_up_the_devices(text: str, devices: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MeshConfig.parse(text).resolve(devices)


def elements_per_device(rules: AxisRules, sizes: dict[str, int]) -> int:
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    params = nnx.state(nnx.eval_shape(lambda: DeepSeekV3(V3, rngs=nnx.Rngs(0))), nnx.Param)
    specs = parameter_specs(params, mesh, rules)
    found = jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
    total = 0
    for leaf, spec in zip(jax.tree.leaves(params), found, strict=True):
        axes = [axis for part in spec if part for axis in ((part,) if isinstance(part, str) else part)]
        total += leaf.size // math.prod(sizes[axis] for axis in axes)
    return total


def test_every_large_parameter_is_divided_as_planned() -> None:
    """Compares the 671B model under the rules with counts of what FSDP, expert and tensor axes should divide."""
    sizes: dict[str, int] = dict(zip(AXES, (1, 1, 32, 1, 16, 4), strict=True))
    counts = count_parameters(V3)
    layers, moe = V3.num_hidden_layers + 1, V3.num_moe_layers + 1
    experts = moe * V3.n_routed_experts * counts.block.routed_expert
    latents = layers * V3.hidden_size * ((V3.q_lora_rank or 0) + V3.kv_lora_rank + V3.qk_rope_head_dim)
    narrow = latents + moe * V3.n_routed_experts * V3.hidden_size + 2 * V3.hidden_size**2  # no tensor axis
    whole = layers * (2 * V3.hidden_size + (V3.q_lora_rank or 0) + V3.kv_lora_rank) + 4 * V3.hidden_size  # norms
    wide = counts.total + counts.mtp_total - moe * V3.n_routed_experts - experts - narrow - whole
    planned = experts / (32 * 16 * 4) + wide / (32 * 4) + narrow / 32 + whole
    assert elements_per_device(AxisRules(), sizes) == planned
    everywhere = V3.num_parameters(mtp=True) / math.prod(sizes.values())
    assert everywhere <= elements_per_device(ZERO, sizes) < 1.02 * everywhere
