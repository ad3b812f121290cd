"""Starting a run on a mesh from a checkpoint: values, peak memory, and the account of the 671B model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from simulated import run_simulated

import dsv3_jax as dsv3
from dsv3_jax.cli.main import main
from dsv3_jax.sharding.mesh import MeshConfig

BENCHMARKS = Path(__file__).parents[2] / "experiments" / "benchmarks"
sys.path.append(str(BENCHMARKS))
from checkpoint_on_mesh import account, check_shards, parameters_on_mesh  # noqa: E402
from synthetic_checkpoint import write  # noqa: E402


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of a process from /proc")
def test_peak_memory(tmp_path: Path) -> None:
    """Beyond the state's own arrays: less than one device's parameters and one piece of a file."""
    config = dsv3.ModelConfig.preset(
        "v3-671b",
        hidden_size=1024,
        intermediate_size=2048,
        moe_intermediate_size=256,
        num_attention_heads=8,
        q_lora_rank=256,
        n_routed_experts=16,
        num_experts_per_tok=4,
        vocab_size=16384,
        num_hidden_layers=3,
        first_k_dense_replace=1,
    )
    write(tmp_path / "source", config, "bfloat16", shard_bytes=10**8)
    arguments = ["--measure", str(tmp_path / "source"), "--mesh", "fsdp=4,expert=2"]
    found = run_simulated(BENCHMARKS / "start_memory.py", *arguments)
    router_biases = 3 * 16  # of two layers and the MTP module; the state keeps them beside the parameters
    assert found["parameter_bytes"] == 4 * (config.num_parameters(mtp=True) - router_biases)
    assert found["state_bytes"] > 3 * found["parameter_bytes"]
    assert found["peak_beyond_state_bytes"] < found["parameter_bytes_of_one_device"] + found["piece_bytes"]


@pytest.mark.slow
def test_state_on_a_mesh_is_the_state_on_one_device(tmp_path: Path) -> None:
    """From a published checkpoint, and from the run folder that is imported from it."""
    source, run = tmp_path / "source", tmp_path / "run"
    write(source, dsv3.ModelConfig.preset("tiny"), "bfloat16")
    assert main(["import-hf", str(source), str(run), "--tokenizer", "byte"]) == 0
    sources = [str(source), str(run)]
    found = run_simulated(Path(__file__).with_name("simulated_start.py"), *sources)
    wanted = {"equal": True, "sharded_as_the_layout_says": True, "equal_when_donated": True}
    assert found == dict.fromkeys(sources, wanted)


class TestAccountOfAMesh:
    """Shards and pieces of the published tensors, by the benchmark that makes the account of the 671B model."""

    @pytest.mark.parametrize("mesh", ["stage=2,expert=4,data=2", "fsdp=4,expert=2,tensor=2", "data=8"])
    def test_every_shard_is_filled_once(self, mesh: str) -> None:
        """The account itself checks that shards tile the parameters and that pieces fill each shard exactly once."""
        config = dsv3.ModelConfig.preset("tiny", num_hidden_layers=5)
        found = account(config, MeshConfig.parse(mesh))
        assert found["parameters"] == config.num_parameters(mtp=True)
        if mesh == "data=8":  # every device keeps all, and each host reads each byte once
            assert found["bytes_per_device"] == 4 * config.num_parameters(mtp=True)
            assert found["bytes_read_by_all_hosts"] == found["file_bytes"]

    def test_shards_of_671b_parameters(self) -> None:
        """Under the report's mesh: 256 experts over 64 ranks, the rest over 16 stages along the hidden dimension."""
        mesh = MeshConfig(stage=16, expert=64, data=2)
        found = parameters_on_mesh(dsv3.ModelConfig.preset("v3-671b"), mesh)
        sizes = {path: check_shards(parameter, mesh) for path, parameter in found.items()}
        assert sizes["moe_blocks.feed_forward.experts.gate_up"] == 58 * 4 * 2 * 2048 * (7168 // 16) * 4
        assert sizes["moe_blocks.feed_forward.experts.down"] == 58 * 4 * (7168 // 16) * 2048 * 4
        assert sizes["embedding.weight"] == 129280 * (7168 // 16) * 4
        assert sizes["moe_blocks.feed_forward.router.bias"] == 58 * 256 * 4
