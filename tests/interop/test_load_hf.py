"""load_hf: golden logits, dtypes, FP8, meshes, memory, and checkpoints that are not what they say."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from interop.checkpoints import (
    GOLDEN,
    float32,
    fp8_checkpoint,
    golden_config,
    golden_tensors,
    raw_tensors,
    write_checkpoint,
    write_tensors,
)
from safetensors.numpy import load_file
from simulated import run_simulated

import dsv3_jax as dsv3
from dsv3_jax.errors import ConfigError, UserError
from dsv3_jax.interop import streaming
from dsv3_jax.interop.account import take_account
from dsv3_jax.interop.checkpoint_folder import open_checkpoint
from dsv3_jax.interop.file_pieces import pieces
from dsv3_jax.interop.fp8_weights import dequantise
from dsv3_jax.interop.hf_config import read_config
from dsv3_jax.interop.importer import stored_tensors
from dsv3_jax.interop.parameter_tree import arrays
from dsv3_jax.interop.safetensors_reader import read_header
from dsv3_jax.interop.tensor_names import published_tensors
from dsv3_jax.precision.fp8_weight import Fp8Weight

NAMES = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))
NAME = "v3_negative_bias"
F32 = np.dtype(np.float32)


@pytest.fixture(scope="module")
def whole() -> dict[str, np.ndarray]:
    """The golden checkpoint's parameters, loaded in the plainest way."""
    return {path: np.asarray(value) for path, value in arrays(dsv3.load_hf(GOLDEN / NAME)).items()}


def forward(model: dsv3.DeepSeekV3, ids: jax.Array) -> dsv3.ModelOutput:
    """The model's output by one compiled program."""
    graph, state = nnx.split(model)
    return jax.jit(lambda state, ids: nnx.merge(graph, state)(ids))(state, ids)


class TestGolden:
    @pytest.mark.parametrize("name", NAMES)
    def test_logits(self, name: str) -> None:
        """float32 sums of some hundred terms in another order: a few units in the last place of logits near 10."""
        io = load_file(GOLDEN / name / "io.safetensors")
        out = forward(dsv3.load_hf(GOLDEN / name), jnp.asarray(io["ids"], jnp.int32))
        np.testing.assert_allclose(out.logits, io["logits"], rtol=0, atol=2e-5)
        for logits in out.mtp_logits:
            np.testing.assert_allclose(logits, io["mtp_logits"], rtol=0, atol=2e-5)

    def test_half_layout_of_rope_is_moved(self, tmp_path: Path, whole: dict[str, np.ndarray]) -> None:
        """rope_interleave false: pair i is rows (i, i + half) of the rotary part instead of (2i, 2i + 1)."""
        config = golden_config(NAME)
        nope, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
        rank, heads = config["kv_lora_rank"], config["num_attention_heads"]
        order = [*range(0, rope, 2), *range(1, rope, 2)]
        tensors = golden_tensors(NAME)
        for key, (dtype, shape, data) in tensors.items():
            matrix = np.frombuffer(data, np.float32).reshape(shape).copy()
            if "q_b_proj" in key:
                view = matrix.reshape(heads, nope + rope, -1)
                view[:, nope:] = view[:, nope:][:, order]
            elif "kv_a_proj" in key:
                matrix[rank:] = matrix[rank:][order]
            tensors[key] = (dtype, shape, matrix.tobytes())
        folder = write_checkpoint(tmp_path, tensors, config | {"rope_interleave": False})
        for path, value in arrays(dsv3.load_hf(folder)).items():
            np.testing.assert_array_equal(value, whole[path], err_msg=path)


class TestDtypes:
    def test_chosen(self, whole: dict[str, np.ndarray]) -> None:
        for path, value in arrays(dsv3.load_hf(GOLDEN / NAME, dtype="bfloat16")).items():
            wanted = jnp.float32 if path.endswith("bias") else jnp.bfloat16
            assert value.dtype == wanted
            np.testing.assert_array_equal(value, whole[path].astype(wanted))

    def test_stored_is_kept_and_mixed_widened(self, tmp_path: Path, whole: dict[str, np.ndarray]) -> None:
        tensors = golden_tensors(NAME)
        for key, (_, shape, data) in tensors.items():
            stays = ("kv_b_proj" in key and ".1." in key) or "bias" in key
            if not stays:
                values = np.frombuffer(data, np.float32).astype(ml_dtypes.bfloat16)
                tensors[key] = ("BF16", shape, values.tobytes())
        for path, value in arrays(dsv3.load_hf(write_checkpoint(tmp_path, tensors, NAME))).items():
            mixed = path == "moe_blocks.attention.kv_b.weight" or path.endswith("bias")
            assert value.dtype == (jnp.float32 if mixed else jnp.bfloat16), path
            if not mixed:
                np.testing.assert_array_equal(value, whole[path].astype(jnp.bfloat16))

    @pytest.mark.parametrize("dtype", ["int8", "nonsense", "float8_e4m3fn"])
    def test_refused(self, dtype: str) -> None:
        with pytest.raises(ConfigError, match="float32 or bfloat16"):
            dsv3.load_hf(GOLDEN / NAME, dtype=dtype)


class TestFp8:
    @pytest.mark.parametrize("power", [False, True])
    def test_dequantised_or_kept(self, tmp_path: Path, power: bool) -> None:
        folder = fp8_checkpoint(tmp_path, "v3_yarn_small", power=power)
        raw = raw_tensors(folder)
        plain = arrays(dsv3.load_hf(folder, dtype="float32"))
        kept = arrays(dsv3.load_hf(folder, keep_fp8=True))
        fp8 = [path for path, value in kept.items() if isinstance(value, Fp8Weight)]
        assert set(fp8) == {t.path for t in published_tensors(dsv3.load_hf(folder).config) if t.quantised}
        for path in ("dense_blocks.attention.kv_a.weight", "moe_blocks.feed_forward.experts.gate_up"):
            wide = jax.jit(lambda weight: weight.astype(jnp.float32))(kept[path])
            np.testing.assert_array_equal(wide, plain[path], err_msg=path)
        name = "model.layers.2.mlp.experts.5.up_proj.weight"
        values = np.frombuffer(raw[name][2], ml_dtypes.float8_e4m3fn).reshape(raw[name][1])
        scales = np.frombuffer(raw[name + "_scale_inv"][2], np.float32).reshape(raw[name + "_scale_inv"][1])
        np.testing.assert_array_equal(
            plain["moe_blocks.feed_forward.experts.gate_up"][1, 5, 1], dequantise(values, scales)
        )
        stored = arrays(dsv3.load_hf(folder))
        assert {value.dtype for path, value in stored.items() if path in fp8} == {np.dtype(jnp.bfloat16)}

    def test_kept_computes_the_same(self, tmp_path: Path) -> None:
        folder = fp8_checkpoint(tmp_path, "v2_lite")
        ids = jnp.arange(12, dtype=jnp.int32)[None]
        plain = forward(dsv3.load_hf(folder, dtype="float32"), ids).logits
        kept = forward(dsv3.load_hf(folder, keep_fp8=True), ids).logits
        np.testing.assert_allclose(kept, plain, rtol=0, atol=1e-5)

    def test_scales_of_the_wrong_shape(self, tmp_path: Path) -> None:
        folder = fp8_checkpoint(tmp_path, NAME)
        for shard in folder.glob("*.safetensors"):
            tensors = {}
            for key, entry in read_header(shard).items():
                tensors[key] = (entry.dtype, entry.shape, entry.read().tobytes())
                if key.endswith("1.self_attn.o_proj.weight_scale_inv"):
                    tensors[key] = float32(np.ones((2, 1)))
            write_tensors(shard, tensors)
        with pytest.raises(UserError, match=r"o_proj\.weight_scale_inv' is F32 \[2, 1\]; expected F32 \[1, 1\]"):
            dsv3.load_hf(folder)


class TestPlacing:
    """Pieces far smaller than tensors, so that every seam is crossed."""

    @pytest.fixture(autouse=True)
    def _small_pieces(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(streaming, "PIECE_BYTES", 256)

    def check(self, model: dsv3.DeepSeekV3, whole: dict[str, np.ndarray]) -> None:
        for path, value in arrays(model).items():
            np.testing.assert_array_equal(value, whole[path], err_msg=path)

    def test_pieces(self, whole: dict[str, np.ndarray]) -> None:
        self.check(dsv3.load_hf(GOLDEN / NAME), whole)

    def test_accelerator_s_way(self, whole: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
        """Pieces put one by one into an array on the device, by donation."""
        monkeypatch.setattr(streaming, "HostShard", streaming.DeviceShard)
        monkeypatch.setattr(streaming, "PIECE_BYTES", 4096)
        self.check(dsv3.load_hf(GOLDEN / "v2_lite"), {p: np.asarray(v) for p, v in arrays(load_plain()).items()})

    def test_adopted_memory_outlives_the_loader(self, whole: dict[str, np.ndarray]) -> None:
        model = dsv3.load_hf(GOLDEN / NAME)
        churn = [np.full(1 << 16, 7, np.uint8) for _ in range(200)]
        del churn
        self.check(model, whole)

    def test_shards_of_a_parameter(self, tmp_path: Path) -> None:
        """Each parameter cut along every axis at a random index; FP8 rows that begin inside a block too.

        The shards equal the parts of the whole parameter, and every byte of the files is read once.
        """
        folder = fp8_checkpoint(tmp_path, NAME)
        model = arrays(dsv3.load_hf(folder, dtype="float32"))
        checkpoint, published = open_checkpoint(folder), read_config(folder)
        stored = stored_tensors(checkpoint, published, take_account(checkpoint, published).consumed)
        rng = np.random.default_rng(0)
        device = jax.devices()[0]
        for path, value in model.items():
            cuts = [(0, int(rng.integers(1, size)), size) if size > 1 else (0, 1) for size in value.shape]
            boxes = list(itertools.product(*(itertools.pairwise(cut) for cut in cuts)))
            shards = {box: streaming.HostShard(tuple(b - a for a, b in box), F32, [device]) for box in boxes}
            parts = list(pieces(stored[path], boxes, 256))
            for piece in parts:
                streaming._load(piece, shards)
            for box in boxes:
                wanted = value[tuple(slice(*axis) for axis in box)]
                np.testing.assert_array_equal(shards[box].finish()[0], wanted, err_msg=f"{path} {box}")
            assert sum(p.size for p in parts) == value.size, path


def load_plain() -> dsv3.DeepSeekV3:
    return dsv3.load_hf(GOLDEN / "v2_lite")


class TestWrongContents:
    def test_nan_is_warned_of_by_name(self, tmp_path: Path) -> None:
        tensors = golden_tensors(NAME)
        name = "model.layers.2.mlp.experts.7.down_proj.weight"
        dtype, shape, data = tensors[name]
        values = np.frombuffer(data, np.float32).copy()
        values[3] = np.nan
        tensors[name] = (dtype, shape, values.tobytes())
        with pytest.warns(UserWarning, match=f"'{name}' holds NaN"):
            dsv3.load_hf(write_checkpoint(tmp_path, tensors, NAME))

    def test_whole_weights_are_not_warned_of(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            dsv3.load_hf(GOLDEN / NAME)

    @pytest.mark.parametrize("copy", ["embed_tokens", "shared_head.head"])
    def test_copies_that_differ(self, tmp_path: Path, copy: str) -> None:
        tensors = golden_tensors(NAME)
        name = f"model.layers.3.{copy}.weight"
        dtype, shape, data = tensors[name]
        tensors[name] = (dtype, shape, data[:-1] + bytes([data[-1] ^ 1]))
        folder = write_checkpoint(tmp_path, tensors, NAME)
        with pytest.raises(UserError, match=f"'{name}' differs"):
            dsv3.load_hf(folder)
        assert dsv3.load_hf(folder, mtp=False).config.num_nextn_predict_layers == 0

    def test_mtp_announced_but_absent(self, tmp_path: Path) -> None:
        tensors = {k: v for k, v in golden_tensors(NAME).items() if not k.startswith("model.layers.3.")}
        with pytest.warns(UserWarning, match="without MTP"):
            model = dsv3.load_hf(write_checkpoint(tmp_path, tensors, NAME))
        assert model.config.num_nextn_predict_layers == 0


@pytest.mark.slow
def test_over_eight_simulated_devices() -> None:
    """Equal to one device's values, under the shardings of the model: experts over expert x fsdp x tensor ranks."""
    meshes = {
        "data=2,expert=4": (1 / 4, 1),
        "fsdp=4,expert=2": (1 / 8, 1 / 4),
        "fsdp=2,expert=2,tensor=2": (1 / 8, 1 / 4),
    }
    found = run_simulated(Path(__file__).with_name("simulated_mesh.py"), str(GOLDEN / "v3_yarn_small"), *meshes)
    assert found == {
        mesh: {"equal": True, "as_the_model_keeps_them": True, "experts": experts, "head": head}
        for mesh, (experts, head) in meshes.items()
    }
