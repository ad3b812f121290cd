"""config.json in and out: both forms of RoPE settings, every family, and what must be refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interop.checkpoints import GOLDEN, golden_config

from dsv3_jax.config import ModelConfig, RopeScaling
from dsv3_jax.errors import ConfigError, UserError
from dsv3_jax.interop.hf_config import Quantization, from_published, read_config, to_published

V3 = "v3_yarn_small"
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
EXPRESSIBLE = [
    "v3-671b",
    "kimi-k2-1t",
    "moonlight-16b",
    "nano",
]


def newer_form(values: dict[str, Any]) -> dict[str, Any]:
    """As transformers 5 writes it: rope_parameters with theta inside, dtype, and fields that follow from others."""
    values = dict(values)
    scaling = values.pop("rope_scaling", None) or {"rope_type": "default"}
    kind = scaling.get("type", "default")
    values["rope_parameters"] = {**scaling, "rope_type": kind, "rope_theta": values.pop("rope_theta")}
    values["dtype"] = values.pop("torch_dtype", "float32")
    values["qk_head_dim"] = values["qk_nope_head_dim"] + values["qk_rope_head_dim"]
    values["head_dim"] = values["qk_rope_head_dim"]
    return values


class TestReading:
    @pytest.mark.parametrize(
        "folder", sorted(path.parent for path in GOLDEN.glob("*/config.json")), ids=lambda p: p.name
    )
    def test_both_forms_say_the_same(self, folder: Path) -> None:
        values = golden_config(folder.name)
        assert from_published(newer_form(values)) == from_published(values) == read_config(folder)

    def test_published_671b(self) -> None:
        """The values of the published V3 and R1 files, written out from the report's section 4.2."""
        values = {
            "architectures": ["DeepseekV3ForCausalLM"],
            "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
            "model_type": "deepseek_v3",
            "attention_bias": False,
            "aux_loss_alpha": 0.001,
            "first_k_dense_replace": 3,
            "hidden_act": "silu",
            "hidden_size": 7168,
            "initializer_range": 0.02,
            "intermediate_size": 18432,
            "kv_lora_rank": 512,
            "max_position_embeddings": 163840,
            "moe_intermediate_size": 2048,
            "moe_layer_freq": 1,
            "n_group": 8,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_attention_heads": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 61,
            "num_key_value_heads": 128,
            "num_nextn_predict_layers": 1,
            "pretraining_tp": 1,
            "q_lora_rank": 1536,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "quantization_config": FP8,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {
                "type": "yarn",
                "factor": 40,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 4096,
            },
            "rope_theta": 10000,
            "routed_scaling_factor": 2.5,
            "scoring_func": "sigmoid",
            "seq_aux": True,
            "tie_word_embeddings": False,
            "topk_group": 4,
            "topk_method": "noaux_tc",
            "torch_dtype": "bfloat16",
            "v_head_dim": 128,
            "vocab_size": 129280,
        }
        published = from_published(values)
        assert published.quantization == Quantization()
        model = published.model
        assert model.num_parameters() == 671_026_419_200
        assert model.rope_scaling == RopeScaling(factor=40.0, original_max_position_embeddings=4096)
        ours = ModelConfig.preset("v3-671b")
        differing = {n for n in ours.to_dict() if ours.to_dict()[n] != model.to_dict()[n]}
        # What a checkpoint is after the two context extensions, and transformers' own initial weights.
        assert differing <= {"max_position_embeddings", "rope_scaling", "initializer_range"}

    def test_ue8m0(self) -> None:
        values = golden_config(V3, quantization_config=FP8 | {"scale_fmt": "ue8m0"})
        assert from_published(values).quantization == Quantization(power_of_two_scales=True)

    def test_absent_fields_have_the_defaults_of_every_loader(self) -> None:
        """DeepseekV3Config's, of transformers and of the code beside the weights; null says something else."""
        values = golden_config(V3, rope_parameters=None)
        for name in (
            *("n_group", "topk_group", "norm_topk_prob", "scoring_func", "topk_method", "rms_norm_eps", "rope_theta"),
            *("rope_scaling", "rope_interleave", "hidden_act", "attention_bias", "initializer_range"),
            *("num_key_value_heads", "tie_word_embeddings", "moe_layer_freq", "attention_dropout"),
        ):
            values.pop(name, None)
        published = from_published(values | {"n_routed_experts": 16})
        model = published.model
        assert (model.n_group, model.topk_group) == (8, 4)
        assert (model.norm_topk_prob, model.scoring_func, model.topk_method) == (True, "sigmoid", "noaux_tc")
        assert (model.rms_norm_eps, model.rope_theta, model.rope_scaling) == (1e-6, 10_000.0, None)
        assert (published.rope_interleave, model.initializer_range) == (True, 0.02)
        nulls = from_published(values | {"n_group": None, "topk_group": None}).model
        assert (nulls.n_group, nulls.topk_group) == (1, 1)

    def test_unknown_fields_are_named_and_those_that_compute_are_refused(self) -> None:
        harmless = {"_attn_implementation_autoset": True, "trainer": "mine", "sliding_window": None, "\x1b[2Jname": 1}
        published = from_published(golden_config(V3) | harmless)
        assert published.model == from_published(golden_config(V3)).model
        (notice,) = published.notices
        assert all(name in notice for name in ("'_attn_implementation_autoset' (True)", "trainer", "sliding_window"))
        assert "\x1b" not in notice
        for name in ("final_logit_softcapping", "layer_types", "use_qk_norm", "text_config", "swiglu_limit"):
            with pytest.raises(ConfigError, match=name):
                from_published(golden_config(V3) | {name: [1]})

    def test_groups_that_a_v2_model_needs_are_not_guessed(self) -> None:
        values = golden_config("v2_groups")
        del values["n_group"]
        with pytest.raises(ConfigError, match="n_group is missing"):
            from_published(values)

    def test_yarn_without_temperatures_has_the_published_code_s(self) -> None:
        """mscale 1 and mscale_all_dim 0: all of the temperature on cos and sin, none on the softmax."""
        scaling = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 64}
        model = from_published(golden_config(V3, rope_scaling=scaling)).model
        assert model.rope_scaling == RopeScaling(
            factor=4.0, original_max_position_embeddings=64, mscale=1.0, mscale_all_dim=0.0
        )

    def test_latent_epsilon_is_not_the_file_s(self) -> None:
        model = from_published(golden_config(V3, rms_norm_eps=1e-5)).model
        assert (model.rms_norm_eps, model.latent_norm_eps) == (1e-5, 1e-6)

    def test_greedy_never_looks_at_groups(self) -> None:
        model = from_published(golden_config("v2_lite", n_group=4, topk_group=2)).model
        assert (model.n_group, model.topk_group) == (1, 1)

    def test_groups_may_be_null(self) -> None:
        model = from_published(golden_config("v2_lite", n_group=None, topk_group=None)).model
        assert (model.n_group, model.topk_group) == (1, 1)


class TestWriting:
    @pytest.mark.parametrize("preset", EXPRESSIBLE)
    @pytest.mark.parametrize("quantization", [None, Quantization(), Quantization(power_of_two_scales=True)])
    def test_reads_back_the_same(self, preset: str, quantization: Quantization | None) -> None:
        model = ModelConfig.preset(preset)
        text = json.dumps(to_published(model, dtype="bfloat16", quantization=quantization))
        published = from_published(json.loads(text))
        assert (published.model, published.quantization) == (model, quantization)

    @pytest.mark.parametrize("name", sorted(path.parent.name for path in GOLDEN.glob("*/config.json")))
    def test_golden_reads_back_the_same(self, name: str) -> None:
        model = from_published(golden_config(name)).model
        assert from_published(to_published(model, dtype="float32")).model == model

    @pytest.mark.parametrize(
        "changes",
        [
            {"latent_norm_eps": 1e-5},
            {"mtp_hidden_after_final_norm": False},
            {"scoring_func": "softmax"},
            {"scoring_func": "softmax", "topk_method": "greedy", "n_group": 1, "topk_group": 1},
        ],
    )
    def test_refuses_what_the_layout_has_no_word_for(self, changes: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match="published"):
            to_published(ModelConfig.preset("nano", **changes), dtype="float32")


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "llama"}, "model_type 'llama'"),
    ({"model_type": None}, "model_type None"),
    ({"model_type": ["deepseek_v3"]}, "model_type"),
    ({"n_routed_experts": 2**60}, "n_routed_experts"),
    ({"vocab_size": 2**60}, "vocab_size"),
    ({"num_hidden_layers": 10**6}, "num_hidden_layers"),
    ({"num_hidden_layers": 10**400}, "num_hidden_layers"),
    ({"num_nextn_predict_layers": 2**60}, "num_nextn_predict_layers"),
    ({"hidden_size": -1}, "hidden_size"),
    ({"hidden_size": 0}, "hidden_size"),
    ({"hidden_size": 48.0}, "hidden_size"),
    ({"hidden_size": "48"}, "hidden_size"),
    ({"hidden_size": True}, "hidden_size"),
    ({"hidden_size": None}, "hidden_size"),
    ({"hidden_size": [48]}, "hidden_size"),
    ({"hidden_size": {"a": 1}}, "hidden_size"),
    ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
    ({"n_group": 3}, "n_group"),
    ({"topk_group": 3}, "topk_group"),
    ({"first_k_dense_replace": 4}, "first_k_dense_replace"),
    ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
    ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
    ({"routed_scaling_factor": 10**400}, "routed_scaling_factor"),
    ({"rope_theta": -1.0}, "rope_theta"),
    ({"rope_theta": [10000]}, "rope_theta"),
    ({"qk_rope_head_dim": 7}, "qk_rope_head_dim"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    ({"rope_scaling": {"factor": 2.0}}, "no type"),
    ({"rope_scaling": {"type": "yarn"}}, "factor is missing"),
    ({"rope_scaling": {"type": "yarn", "factor": 0.5, "original_max_position_embeddings": 64}}, "factor"),
    ({"rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": 6.5}}, "whole number"),
    (
        {"rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": 64, "x": 1}},
        "unknown fields 'x'",
    ),
    ({"rope_scaling": "yarn"}, "rope_scaling must be an object"),
    ({"rope_parameters": {"rope_theta": 1.5, "rope_type": "default"}}, "differ"),
    ({"attention_bias": True}, "attention_bias"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    ({"moe_layer_freq": 2}, "moe_layer_freq"),
    ({"num_key_value_heads": 1}, "num_key_value_heads"),
    ({"qk_head_dim": 1}, "qk_head_dim"),
    ({"scoring_func": "softmax"}, "scoring_func"),
    ({"scoring_func": 3}, "scoring_func"),
    ({"topk_method": "greedy"}, "topk_method"),
    ({"norm_topk_prob": "yes"}, "norm_topk_prob"),
    ({"num_mtp_layers": 2}, "num_mtp_layers differ"),
    ({"rope_interleave": "no"}, "rope_interleave"),
    ({"quantization_config": {"quant_method": "awq"}}, "quant_method"),
    ({"quantization_config": {**FP8, "weight_block_size": [64, 64]}}, "weight_block_size"),
    ({"quantization_config": {**FP8, "fmt": "e5m2"}}, "fmt"),
    ({"quantization_config": {**FP8, "scale_fmt": "e4m3"}}, "scale_fmt"),
    ({"quantization_config": []}, "quantization_config"),
    ({"sliding_window": 4096}, "sliding_window"),
    ({"index_topk": 2048}, "index_topk"),
    ({"\x1b[2Jsliding_window": 1}, "x1b"),
    ({"norm_topk_prob": None}, "norm_topk_prob is null"),
]


class TestRefusing:
    @pytest.mark.parametrize(("changes", "words"), WRONG, ids=[str(i) for i in range(len(WRONG))])
    def test_one_line_that_names_the_field(self, changes: dict[str, Any], words: str) -> None:
        with pytest.raises(ConfigError, match=words) as caught:
            from_published(golden_config(V3) | changes)
        assert len(str(caught.value).splitlines()) == 1
        assert len(str(caught.value)) < 500

    @pytest.mark.parametrize("name", ["vocab_size", "q_lora_rank", "n_shared_experts", "kv_lora_rank", "model_type"])
    def test_missing_field(self, name: str) -> None:
        values = golden_config(V3)
        del values[name]
        with pytest.raises(ConfigError, match=name):
            from_published(values)

    def test_v2_that_normalises(self) -> None:
        with pytest.raises(ConfigError, match="norm_topk_prob"):
            from_published(golden_config("v2_lite", norm_topk_prob=True))

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("", "not valid JSON"),
            ("null", "JSON object"),
            ('{"a": 1, "a": 2}', "twice"),
            ('{"vocab_size": Infinity}', "Infinity"),
            ("[" * 200_000, "deeper"),
            (" " * 1_000_001, "larger than"),
            ('{"model_type": "' + "x" * 900_000 + '"}', "model_type"),
        ],
    )
    def test_broken_file(self, tmp_path: Path, text: str, words: str) -> None:
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=words) as caught:
            read_config(tmp_path)
        assert "config.json" in str(caught.value)
        assert len(str(caught.value)) < 600

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"config\.json: is missing"):
            read_config(tmp_path)

    @settings(max_examples=300, deadline=None)
    @given(
        name=st.sampled_from([*golden_config(V3), "quantization_config", "rope_parameters", "num_mtp_layers"]),
        value=st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from(["type", "factor", "rope_theta", "quant_method", "x"]), inner)
            ),
            max_leaves=6,
        ),
    )
    def test_any_value_is_taken_or_refused(self, name: str, value: Any) -> None:
        try:
            published = from_published(golden_config(V3) | {name: value})
        except ConfigError as error:
            message = str(error)
        else:
            message = ""
            assert isinstance(published.model, ModelConfig)
        assert len(message) < 700
