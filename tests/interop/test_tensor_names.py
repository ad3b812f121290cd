"""Names, dtypes and shapes against the published checkpoints, and the account of a folder."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from pathlib import Path

import pytest
from interop.checkpoints import GOLDEN, float32, golden_config, golden_tensors, write_checkpoint, write_index

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import UserError
from dsv3_jax.interop.account import Account, take_account
from dsv3_jax.interop.checkpoint_folder import open_checkpoint
from dsv3_jax.interop.hf_config import PublishedConfig, Quantization, read_config, to_published
from dsv3_jax.interop.stored_format import uniform_format
from dsv3_jax.interop.tensor_names import published_tensors

FACTS = json.loads((Path(__file__).parent / "published_facts.json").read_text())
PRESETS = {"deepseek-r1": "v3-671b", "kimi-k2": "kimi-k2-1t"}


class TestAgainstThePublishedLists:
    """published_facts.json holds the counts of the 671B and the 1T checkpoint and a digest of their whole lists.

    The digest is of the sorted lines `name dtype shape`, RoPE frequencies left out.
    """

    @pytest.mark.parametrize("published", FACTS)
    def test_an_export_writes_exactly_that_list(self, published: str) -> None:
        facts, config = FACTS[published], ModelConfig.preset(PRESETS[published])
        specs = list(uniform_format(config, "fp8").specs(config))
        count, elements = Counter(), Counter()
        for spec in specs:
            count[spec.dtype] += 1
            elements[spec.dtype] += math.prod(spec.shape)
        assert len(specs) == facts["tensors"]
        assert count == facts["tensors_by_dtype"]
        assert elements == facts["elements_by_dtype"]
        lines = sorted(f"{s.name} {s.dtype} {'x'.join(map(str, s.shape))}" for s in specs)
        assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == facts["sha256_of_sorted_lines"]

    @pytest.mark.parametrize("published", FACTS)
    def test_every_parameter_is_filled_once(self, published: str, tmp_path: Path) -> None:
        """From config.json and the index alone, as `import-hf --dry-run` does it."""
        config = ModelConfig.preset(PRESETS[published])
        account = account_of_index(tmp_path, config)
        assert account.tensor_count == FACTS[published]["tensors"] + 1
        assert account.ignored == ("model.layers.0.self_attn.rotary_emb.inv_freq",)
        assert f"{config.num_parameters():,}" in account.describe()
        filled = sum(math.prod(tensor.shape) for tensor in account.consumed)
        assert filled == config.num_parameters(mtp=True)


def account_of_index(folder: Path, config: ModelConfig) -> Account:
    names = [spec.name for spec in uniform_format(config, "fp8").specs(config)]
    write_index(folder, dict.fromkeys([*names, "model.layers.0.self_attn.rotary_emb.inv_freq"], "a.safetensors"))
    values = to_published(config, dtype="bfloat16", quantization=Quantization())
    (folder / "config.json").write_text(json.dumps(values))
    return take_account(open_checkpoint(folder, headers=False), read_config(folder))


def test_two_mtp_modules(tmp_path: Path) -> None:
    account = account_of_index(tmp_path, ModelConfig.preset("tiny", num_nextn_predict_layers=2))
    assert len(account.copies) == 4


def test_scales_missing_from_an_index(tmp_path: Path) -> None:
    config = ModelConfig.preset("tiny")
    write_index(tmp_path, dict.fromkeys([tensor.name for tensor in published_tensors(config)], "a.safetensors"))
    published = PublishedConfig(config, Quantization())
    with pytest.raises(UserError, match=r"_scale_inv'.* missing"):
        take_account(open_checkpoint(tmp_path, headers=False), published)


class TestAccountOfGolden:
    NAME = "v3_negative_bias"

    def account(self, folder: Path, **options: bool) -> Account:
        checkpoint = open_checkpoint(folder)
        return take_account(checkpoint, read_config(checkpoint.path), **options)

    @pytest.mark.parametrize("name", sorted(path.parent.name for path in GOLDEN.glob("*/config.json")))
    def test_each_tensor_is_consumed_once(self, name: str) -> None:
        account = self.account(GOLDEN / name)
        names = [tensor.name for tensor in (*account.consumed, *account.copies)]
        assert sorted(names) == sorted(golden_tensors(name))

    @pytest.mark.parametrize(
        "lost",
        [
            "lm_head.weight",
            "model.layers.0.mlp.up_proj.weight",
            "model.layers.1.mlp.experts.3.down_proj.weight",
            "model.layers.1.mlp.gate.e_score_correction_bias",
            "model.layers.3.enorm.weight",
        ],
    )
    def test_missing(self, tmp_path: Path, lost: str) -> None:
        tensors = golden_tensors(self.NAME)
        del tensors[lost]
        with pytest.raises(UserError, match=f"tensor '{lost}' missing"):
            self.account(write_checkpoint(tmp_path, tensors, self.NAME))

    @pytest.mark.parametrize(
        "name",
        [
            "model.layers.4.input_layernorm.weight",
            "model.layers.1.mlp.experts.16.up_proj.weight",
            "model.layers.0.mlp.gate.weight",
            "lm_head.bias",
            "model.embed_tokens.weight_scale_inv",
            "model.layers.1.self_attn.o_proj.weight_scale_inv",
            "model.layers.²3.x",
            "../../x",
        ],
    )
    def test_extra(self, tmp_path: Path, name: str) -> None:
        import numpy as np

        tensors = golden_tensors(self.NAME) | {name: float32(np.zeros((1, 1)))}
        with pytest.raises(UserError, match="left over"):
            self.account(write_checkpoint(tmp_path, tensors, self.NAME))

    @pytest.mark.parametrize(
        ("dtype", "shape", "words"),
        [
            ("F32", (32, 31), r"has shape \[32, 31\]; config.json makes it \[32, 24\]"),
            ("F32", (24, 32), "shape"),
            ("F32", (32 * 24,), "shape"),
            ("I8", (32, 24), "has dtype I8"),
            ("F64", (32, 24), "has dtype F64"),
            ("F8_E5M2", (32, 24), "has dtype F8_E5M2"),
            ("F8_E4M3", (32, 24), "scales .* are missing"),
        ],
    )
    def test_wrong_dtype_or_shape(self, tmp_path: Path, dtype: str, shape: tuple[int, ...], words: str) -> None:
        from dsv3_jax.interop.safetensors_reader import DTYPES

        name = "model.layers.1.self_attn.o_proj.weight"
        tensors = golden_tensors(self.NAME)
        tensors[name] = (dtype, shape, bytes(math.prod(shape) * DTYPES[dtype].itemsize))
        with pytest.raises(UserError, match=words) as caught:
            self.account(write_checkpoint(tmp_path, tensors, self.NAME))
        assert name in str(caught.value)
        assert "model.safetensors" in str(caught.value)

    def test_norms_are_never_fp8(self, tmp_path: Path) -> None:
        name = "model.norm.weight"
        tensors = golden_tensors(self.NAME)
        tensors[name] = ("F8_E4M3", (32,), bytes(32))
        with pytest.raises(UserError, match="has dtype F8_E4M3; expected F32, BF16, F16"):
            self.account(write_checkpoint(tmp_path, tensors, self.NAME))

    def test_without_mtp_it_says_so(self, tmp_path: Path) -> None:
        tensors = {k: v for k, v in golden_tensors(self.NAME).items() if not k.startswith("model.layers.3.")}
        account = self.account(write_checkpoint(tmp_path, tensors, self.NAME))
        assert account.config.num_nextn_predict_layers == 0
        assert "without MTP" in account.notices[0]

    def test_mtp_left_out(self) -> None:
        account = self.account(GOLDEN / self.NAME, mtp=False)
        assert account.config.num_nextn_predict_layers == 0
        assert all(name.startswith("model.layers.3.") for name in account.ignored)
        assert account.ignored

    def test_mtp_modules_that_config_does_not_announce(self, tmp_path: Path) -> None:
        tensors, config = golden_tensors(self.NAME), golden_config(self.NAME)
        zero = write_checkpoint(tmp_path / "zero", tensors, config | {"num_nextn_predict_layers": 0})
        assert self.account(zero, mtp=False).config.num_nextn_predict_layers == 0
        with pytest.raises(UserError, match=r"num_nextn_predict_layers 0, but 1 MTP modules .*--no-mtp"):
            self.account(zero)
        del config["num_nextn_predict_layers"]
        absent = write_checkpoint(tmp_path / "absent", tensors, config)
        assert self.account(absent, mtp=False).config.num_nextn_predict_layers == 0
        assert self.account(absent).config.num_nextn_predict_layers == 1
        assert "has no num_nextn_predict_layers" in self.account(absent).notices[0]

    def test_layers_beyond_the_announced_are_no_mtp_modules(self, tmp_path: Path) -> None:
        """A wrong num_hidden_layers is not taken for MTP modules that may be left out."""
        config = golden_config(self.NAME, num_hidden_layers=2, num_nextn_predict_layers=0)
        for mtp in (True, False):
            with pytest.raises(UserError, match="left over"):
                self.account(write_checkpoint(tmp_path, golden_tensors(self.NAME), config), mtp=mtp)

    def test_copies_may_be_absent(self, tmp_path: Path) -> None:
        tensors = golden_tensors(self.NAME)
        del tensors["model.layers.3.embed_tokens.weight"]
        assert len(self.account(write_checkpoint(tmp_path, tensors, self.NAME)).copies) == 1

    def test_absurd_config_beside_real_tensors(self, tmp_path: Path) -> None:
        config = golden_config(self.NAME, n_routed_experts=2**60)
        with pytest.raises(UserError, match=r"config\.json: n_routed_experts"):
            self.account(write_checkpoint(tmp_path, golden_tensors(self.NAME), config))
