"""save_hf: the same bytes back, shards, formats, and never half a checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from interop.checkpoints import GOLDEN, golden_tensors, raw_tensors
from safetensors import safe_open

import dsv3_jax as dsv3
from dsv3_jax.data.tokenizer_training import byte_tokenizer
from dsv3_jax.errors import ConfigError, UserError
from dsv3_jax.interop import exporter
from dsv3_jax.interop.parameter_tree import arrays, with_arrays

NAMES = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))
NAME = "v3_negative_bias"


@pytest.fixture(scope="module")
def model() -> dsv3.DeepSeekV3:
    return dsv3.load_hf(GOLDEN / NAME)


class TestRoundTrip:
    @pytest.mark.parametrize("name", NAMES)
    def test_import_then_export_gives_the_same_bytes(self, name: str, tmp_path: Path) -> None:
        dsv3.save_hf(dsv3.load_hf(GOLDEN / name), tmp_path / "out")
        assert raw_tensors(tmp_path / "out") == golden_tensors(name)

    @pytest.mark.parametrize("power", [False, True])
    def test_fp8_kept_gives_the_same_bytes(self, tmp_path: Path, model: dsv3.DeepSeekV3, power: bool) -> None:
        dsv3.save_hf(model, tmp_path / "fp8", dtype="fp8", power_of_two_scales=power, max_shard_bytes=50_000)
        dsv3.save_hf(dsv3.load_hf(tmp_path / "fp8", keep_fp8=True), tmp_path / "again")
        first, again = raw_tensors(tmp_path / "fp8"), raw_tensors(tmp_path / "again")
        assert first == again
        configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("fp8", "again")]
        assert configs[0] == configs[1]
        assert configs[0]["quantization_config"].get("scale_fmt") == ("ue8m0" if power else None)
        assert first["lm_head.weight"][0] == "BF16"
        assert first["model.layers.1.mlp.gate.e_score_correction_bias"][0] == "F32"
        assert first["model.layers.1.mlp.experts.0.up_proj.weight"][0] == "F8_E4M3"

    def test_bfloat16(self, tmp_path: Path, model: dsv3.DeepSeekV3) -> None:
        dsv3.save_hf(model, tmp_path / "out", dtype="bfloat16")
        back = arrays(dsv3.load_hf(tmp_path / "out"))
        for path, value in arrays(model).items():
            wanted = value if path.endswith("bias") else value.astype(jnp.bfloat16)
            assert back[path].dtype == wanted.dtype
            np.testing.assert_array_equal(back[path], wanted)
        assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"

    def test_from_an_accelerator(self, tmp_path: Path, model: dsv3.DeepSeekV3, monkeypatch: pytest.MonkeyPatch) -> None:
        """Slices cut on the device and brought over one by one."""
        monkeypatch.setattr(
            exporter, "_at", lambda array, at: np.asarray(exporter._slice(array, np.array(at, np.int32), len(at)))
        )
        dsv3.save_hf(model, tmp_path / "out")
        assert raw_tensors(tmp_path / "out") == golden_tensors(NAME)

    def test_two_mtp_modules(self, tmp_path: Path) -> None:
        config = dsv3.ModelConfig.preset("tiny", num_nextn_predict_layers=2)
        empty = nnx.eval_shape(lambda: dsv3.DeepSeekV3(config, rngs=nnx.Rngs(1)))
        rng = np.random.default_rng(0)
        drawn = {path: rng.standard_normal(value.shape, np.float32) for path, value in arrays(empty).items()}
        model = with_arrays(empty, jax.tree.map(jnp.asarray, drawn))
        dsv3.save_hf(model, tmp_path / "out")
        back = arrays(dsv3.load_hf(tmp_path / "out"))
        for path, value in drawn.items():
            np.testing.assert_array_equal(back[path], value)


class TestShards:
    def test_size_index_and_order(self, tmp_path: Path, model: dsv3.DeepSeekV3) -> None:
        dsv3.save_hf(model, tmp_path / "out", max_shard_bytes=40_000)
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
        assert files == sorted(set(index["weight_map"].values()))
        assert files[0] == f"model-00001-of-{len(files):06d}.safetensors"
        assert len(files) > 3
        total = 0
        for name in files:
            with safe_open(tmp_path / "out" / name, "numpy") as shard:
                sizes = [shard.get_tensor(key).nbytes for key in shard.keys()]  # noqa: SIM118
                assert {index["weight_map"][key] for key in shard.keys()} == {name}  # noqa: SIM118
            assert sum(sizes) <= 40_000
            total += sum(sizes)
        assert index["metadata"]["total_size"] == total
        assert raw_tensors(tmp_path / "out") == golden_tensors(NAME)

    def test_a_tensor_larger_than_a_shard_gets_its_own(self, tmp_path: Path, model: dsv3.DeepSeekV3) -> None:
        dsv3.save_hf(model, tmp_path / "out", max_shard_bytes=1)
        assert len(list((tmp_path / "out").glob("*.safetensors"))) == len(golden_tensors(NAME))


class TestTokenizer:
    def test_goes_along(self, tmp_path: Path, model: dsv3.DeepSeekV3) -> None:
        config = dsv3.ModelConfig.preset("tiny")
        empty = nnx.eval_shape(lambda: dsv3.DeepSeekV3(config, rngs=nnx.Rngs(0)))
        zeros = {path: jnp.zeros(value.shape, value.dtype) for path, value in arrays(empty).items()}
        (tmp_path / "tokenizer.json").write_text(byte_tokenizer())
        (tmp_path / "generation_config.json").write_text('{"temperature": 0.6}')
        dsv3.save_hf(with_arrays(empty, zeros), tmp_path / "out", tokenizer=tmp_path)
        assert (tmp_path / "out" / "tokenizer.json").read_text() == byte_tokenizer()
        assert (tmp_path / "out" / "generation_config.json").read_text() == '{"temperature": 0.6}'
        values = json.loads((tmp_path / "out" / "config.json").read_text())
        settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
        tokens = {t["content"]: t["id"] for t in json.loads(byte_tokenizer())["added_tokens"]}
        assert tokens[settings["eos_token"]] == values["eos_token_id"]
        assert tokens[settings["bos_token"]] == values["bos_token_id"]

    @pytest.mark.parametrize(
        ("text", "words"), [("{}", "no object 'model'"), ("\x80\x04", "JSON"), ("[" * 99_999, "nested deeper")]
    )
    def test_that_is_none(self, tmp_path: Path, model: dsv3.DeepSeekV3, text: str, words: str) -> None:
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(UserError, match=words):
            dsv3.save_hf(model, tmp_path / "out", tokenizer=tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json"]

    def test_larger_than_the_vocabulary(self, tmp_path: Path, model: dsv3.DeepSeekV3) -> None:
        (tmp_path / "tokenizer.json").write_text(byte_tokenizer())
        with pytest.raises(UserError, match="vocabulary is 128"):
            dsv3.save_hf(model, tmp_path / "out", tokenizer=tmp_path / "tokenizer.json")


_KILLED = """
import os, signal, sys
import dsv3_jax as dsv3
from dsv3_jax.interop import exporter
model = dsv3.load_hf(sys.argv[1])
write, left = exporter.write_safetensors, [int(sys.argv[3])]
def dying(path, specs, values, advance):
    if not left[0]:
        path.write_bytes(b"half a shard")
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    write(path, specs, values, advance)
exporter.write_safetensors = dying
dsv3.save_hf(model, sys.argv[2], max_shard_bytes=40_000)
"""


class TestWholeOrNotAtAll:
    @pytest.mark.slow
    def test_killed(self, tmp_path: Path) -> None:
        command = [sys.executable, "-c", _KILLED, str(GOLDEN / NAME), str(tmp_path / "out"), "2"]
        done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not (tmp_path / "out").exists()
        for left in tmp_path.iterdir():
            assert left.name.startswith(".out.unfinished-")
            assert not (left / "config.json").exists()
            with pytest.raises(UserError):
                dsv3.load_hf(left)

    def test_full_disk(self, tmp_path: Path, model: dsv3.DeepSeekV3, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(exporter, "write_safetensors", full)
        with pytest.raises(UserError, match="No space left on device"):
            dsv3.save_hf(model, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_any_error(self, tmp_path: Path, model: dsv3.DeepSeekV3, monkeypatch: pytest.MonkeyPatch) -> None:
        def stop(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(exporter, "_write_config", stop)
        with pytest.raises(KeyboardInterrupt):
            dsv3.save_hf(model, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_nothing_is_overwritten(self, tmp_path: Path, model: dsv3.DeepSeekV3) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").write_text("x")
        with pytest.raises(UserError, match="is there already"):
            dsv3.save_hf(model, tmp_path / "out")
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]

    def test_what_cannot_be_said_is_refused_first(self, tmp_path: Path) -> None:
        config = dsv3.ModelConfig.preset("tiny", mtp_hidden_after_final_norm=False)
        empty = nnx.eval_shape(lambda: dsv3.DeepSeekV3(config, rngs=nnx.Rngs(0)))
        with pytest.raises(ConfigError, match="mtp_hidden_after_final_norm"):
            dsv3.save_hf(empty, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_unknown_dtype(self, tmp_path: Path, model: dsv3.DeepSeekV3) -> None:
        with pytest.raises(ConfigError, match="float32, bfloat16, fp8"):
            dsv3.save_hf(model, tmp_path / "out", dtype="int4")  # pyright: ignore[reportArgumentType]
