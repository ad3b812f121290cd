"""Converts published `config.json` files to `ModelConfig` and back.

A known key is translated, or checked against the one value that this architecture has, or known not to change what a
model computes. An absent key has the default of its model type in every loader of the family. An unknown key is refused
if its name says that it changes what a model computes, because ignoring it could load a different model; otherwise it
is named in a notice. Code that a file names (`auto_map`) is never imported.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv3_jax.bounded_json import read_object, shown
from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import ConfigError
from dsv3_jax.interop.rope_config import finite_number, read_rope, whole_number
from dsv3_jax.regular_files import checked_file, checked_folder

CONFIG_NAME = "config.json"
_MAX_CONFIG_BYTES = 1_000_000

# Names of DeepSeek-V3's architecture.
V3_MODEL_TYPES = ("deepseek_v3", "kimi_k2")
V2_MODEL_TYPES = ("deepseek_v2",)

# Fields with the same name and meaning in ModelConfig.
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "num_attention_heads",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "first_k_dense_replace",
    "max_position_embeddings",
    "routed_scaling_factor",
)
# Here null has a meaning: no query compression, no shared experts, no groups.
_NULLABLE: dict[str, Any] = {"q_lora_rank": None, "n_shared_experts": 0, "n_group": 1, "topk_group": 1}
# What loaders take where the key is absent, which is not what null means. deepseek_v2's default is null.
_V3_ABSENT = {"n_group": 8, "topk_group": 4}
_OPTIONAL: dict[str, Any] = {"rms_norm_eps": 1e-6, "initializer_range": 0.02}
_FRACTIONAL = {"routed_scaling_factor", *_OPTIONAL}

# The only values with which config.json describes this architecture.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "tie_word_embeddings": (False,),
    "moe_layer_freq": (1,),
    "pretraining_tp": (1, None),
}
# Parts of names of fields with which other architectures change what a model computes.
_COMPUTES = re.compile(
    "softcap|window|index_|multiplier|logit_scale|logits_scal|(qk|query|key)_(layer)?norm|partial_rotary|layer_types|"
    "per_layer|_config$|adapter|lora|zero_expert|swiglu|clamp|compress|attn_scale|attention_scale|residual|sink|hash|"
    "pattern|conv|embedding_scale|alibi|experts_per|norm_type|temperature|_bias$|position_embedding"
)

# Fields that do not change what a model computes.
_SILENT = {
    "architectures",
    "attention_dropout",
    "auto_map",
    "aux_loss_alpha",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "unk_token_id",
    "ep_size",
    "seq_aux",
    "use_cache",
    "torch_dtype",
    "dtype",
    "transformers_version",
    "_name_or_path",
    "output_router_logits",
    "return_dict",
    "output_hidden_states",
    "output_attentions",
    "chunk_size_feed_forward",
    "is_encoder_decoder",
    "id2label",
    "label2id",
    "problem_type",
    "router_aux_loss_coef",
}
# Fields that follow from others.
_DERIVED = {"num_key_value_heads", "head_dim", "qk_head_dim", "num_local_experts", "num_experts"}
_TRANSLATED = {
    "model_type",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "scoring_func",
    "topk_method",
    "norm_topk_prob",
    "num_nextn_predict_layers",
    "num_mtp_layers",
    "rope_interleave",
    "quantization_config",
}


@dataclasses.dataclass(frozen=True)
class Quantization:
    """The FP8 format of a checkpoint's linear maps: e4m3 values with one scale per block of 128 x 128.

    Attributes:
      power_of_two_scales: whether every scale is a power of two (`scale_fmt: ue8m0`, V3.1).
    """

    power_of_two_scales: bool = False


@dataclasses.dataclass(frozen=True)
class PublishedConfig:
    """The contents of a `config.json`.

    Attributes:
      model: the architecture.
      quantization: the FP8 format; None where weights are not quantised.
      rope_interleave: True where rotary pairs are neighbours (2i, 2i+1), as in every published checkpoint. False where
        they are half a head apart (i, i + width/2); loading reorders the rows.
      says_mtp: whether the number of MTP modules is given; where it is not, the tensors tell.
      notices: lines that the user should read.
    """

    model: ModelConfig
    quantization: Quantization | None = None
    rope_interleave: bool = True
    says_mtp: bool = True
    notices: tuple[str, ...] = ()


def read_config(folder: Path) -> PublishedConfig:
    """Reads the `config.json` of a checkpoint folder (see `from_published`)."""
    path = checked_file(checked_folder(folder), CONFIG_NAME)
    values = read_object(path, max_bytes=_MAX_CONFIG_BYTES)
    try:
        published = from_published(values)
    except ConfigError as error:
        raise ConfigError(f"{folder / CONFIG_NAME}: {error}") from None
    notices = tuple(f"{folder / CONFIG_NAME}: {notice}" for notice in published.notices)
    return dataclasses.replace(published, notices=notices)


def from_published(values: Mapping[str, Any]) -> PublishedConfig:
    """Translates the keys of a `config.json`.

    Raises:
      ConfigError: a key is unknown or missing, or its value has the wrong type or is not possible.
    """
    model_type = values.get("model_type")
    if model_type not in (*V3_MODEL_TYPES, *V2_MODEL_TYPES):
        raise ConfigError(
            f"model_type {shown(model_type)} is not one of {', '.join((*V3_MODEL_TYPES, *V2_MODEL_TYPES))}"
        )
    notices = _check_keys(values)
    _check_fixed(values)
    v2 = model_type in V2_MODEL_TYPES
    fields = _plain_fields(values if v2 else _V3_ABSENT | dict(values))
    if v2 and values.get("topk_method") == "group_limited_greedy" and values.get("n_group") is None:
        raise ConfigError("n_group is missing, which topk_method 'group_limited_greedy' needs")
    _check_derived(values, fields)
    theta, scaling = read_rope(values)
    model = ModelConfig(
        **fields,
        **_routing(values, v2=v2),
        num_nextn_predict_layers=_mtp_layers(values),
        rope_theta=theta,
        rope_scaling=scaling,
        # The published modelling code uses the default of the latents' norms whatever rms_norm_eps is.
        latent_norm_eps=1e-6,
    )
    interleave = values.get("rope_interleave")
    if interleave not in (True, False, None):
        raise ConfigError(f"rope_interleave must be true or false, not {shown(interleave)}")
    says_mtp = any(values.get(name) is not None for name in ("num_nextn_predict_layers", "num_mtp_layers"))
    quantization = _quantization(values.get("quantization_config"))
    return PublishedConfig(model, quantization, interleave is not False, says_mtp or v2, notices)


def to_published(
    config: ModelConfig,
    *,
    dtype: str,
    quantization: Quantization | None = None,
    token_ids: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns the `config.json` of a model, in the form that every loader reads (`rope_theta` and `rope_scaling`).

    Args:
      config: the architecture.
      dtype: name of the dtype of tensors that are not quantised, such as "bfloat16".
      quantization: the FP8 format of the linear maps; None where they are not quantised.
      token_ids: the fields that name token ids: bos_token_id, eos_token_id (one or a list), pad_token_id.

    Raises:
      ConfigError: config.json has no field for a setting of this model.
    """
    _check_expressible(config)
    v3 = config.topk_method == "noaux_tc"
    values: dict[str, Any] = {
        "architectures": ["DeepseekV3ForCausalLM" if v3 else "DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v3" if v3 else "deepseek_v2",
        **{name: getattr(config, name) for name in (*_REQUIRED, *_NULLABLE, *_OPTIONAL)},
        "num_key_value_heads": config.num_attention_heads,
        "scoring_func": config.scoring_func,
        "topk_method": config.topk_method,
        "norm_topk_prob": config.norm_topk_prob,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "moe_layer_freq": 1,
        "ep_size": 1,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": None,
        **(token_ids or {}),
        "torch_dtype": dtype,
    }
    if v3:
        values["num_nextn_predict_layers"] = config.num_nextn_predict_layers
    if config.rope_scaling is not None:
        values["rope_scaling"] = {"type": "yarn", **dataclasses.asdict(config.rope_scaling)}
    if quantization is not None:
        values["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
            **({"scale_fmt": "ue8m0"} if quantization.power_of_two_scales else {}),
        }
    return dict(sorted(values.items()))


def _check_expressible(config: ModelConfig) -> None:
    v2 = config.topk_method != "noaux_tc"
    wanted = {"scoring_func": "softmax" if v2 else "sigmoid", "latent_norm_eps": 1e-6}
    if v2:
        wanted |= {"num_nextn_predict_layers": 0, "norm_topk_prob": False}
    wanted["mtp_hidden_after_final_norm"] = True
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise ConfigError(
                f"{name} is {getattr(config, name)!r}; a published {'deepseek_v2' if v2 else 'deepseek_v3'} "
                f"checkpoint always has {value!r} and has no field for another value"
            )


def _check_keys(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns a notice that names the unknown fields, if there are any; refuses those that change what is computed."""
    known = {*_REQUIRED, *_NULLABLE, *_OPTIONAL, *_FIXED, *_SILENT, *_DERIVED, *_TRANSLATED}
    unknown = sorted(key for key in values if key not in known)
    changing = [key for key in unknown if values[key] and _COMPUTES.search(key.lower())]
    if changing:
        raise ConfigError(
            f"{', '.join(shown(key) for key in changing[:5])}: not a field of this architecture; if it does not change "
            "what the model computes, remove it from config.json"
        )
    missing = [name for name in (*_REQUIRED, "q_lora_rank", "n_shared_experts") if name not in values]
    if missing:
        raise ConfigError(f"{', '.join(missing)} missing")
    if not unknown:
        return ()
    more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
    fields = ", ".join(f"{shown(key)} ({shown(values[key])})" for key in unknown[:5])
    return (f"unknown fields are ignored: {fields}{more}",)


def _check_fixed(values: Mapping[str, Any]) -> None:
    for name, allowed in _FIXED.items():
        if name in values and values[name] not in allowed:
            raise ConfigError(f"{name} is {shown(values[name])}; this architecture allows {allowed[0]!r} only")


def _plain_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    defaults = {**_NULLABLE, **_OPTIONAL}
    for name in (*_REQUIRED, *defaults):
        value = values.get(name)
        if value is None and name in defaults:
            fields[name] = defaults[name]
        else:
            fields[name] = finite_number(name, value) if name in _FRACTIONAL else whole_number(name, value)
    if values.get("topk_method") == "greedy":
        # The published code of this method ignores groups.
        fields["n_group"] = fields["topk_group"] = 1
    return fields


def _check_derived(values: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    """Checks the fields that follow from others."""
    expected = {
        "num_key_value_heads": fields["num_attention_heads"],
        "qk_head_dim": fields["qk_nope_head_dim"] + fields["qk_rope_head_dim"],
        "num_local_experts": fields["n_routed_experts"],
        "num_experts": fields["n_routed_experts"],
    }
    for name, value in expected.items():
        if values.get(name) is not None and values[name] != value:
            raise ConfigError(f"{name} is {shown(values[name])}, but the other fields make it {value}")


def _routing(values: Mapping[str, Any], *, v2: bool) -> dict[str, Any]:
    """Returns how experts are scored and chosen; a missing field has the default of its model type."""
    if "norm_topk_prob" in values and values["norm_topk_prob"] is None:
        # Some loaders take null as true, others as false.
        raise ConfigError("norm_topk_prob is null: say true or false")
    result = {
        "scoring_func": values.get("scoring_func") or ("softmax" if v2 else "sigmoid"),
        "topk_method": values.get("topk_method") or ("greedy" if v2 else "noaux_tc"),
        "norm_topk_prob": values.get("norm_topk_prob"),
    }
    if result["norm_topk_prob"] is None:
        result["norm_topk_prob"] = not v2
    if not isinstance(result["norm_topk_prob"], bool):
        raise ConfigError(f"norm_topk_prob must be true or false, not {shown(result['norm_topk_prob'])}")
    if v2 and result["norm_topk_prob"]:
        raise ConfigError("norm_topk_prob true is not defined for deepseek_v2: its published code ignores it")
    family = ("softmax", ("greedy", "group_limited_greedy")) if v2 else ("sigmoid", ("noaux_tc",))
    if result["scoring_func"] != family[0] or result["topk_method"] not in family[1]:
        raise ConfigError(
            f"scoring_func {shown(result['scoring_func'])} with topk_method {shown(result['topk_method'])}: "
            f"{'deepseek_v2' if v2 else 'deepseek_v3'} has {family[0]} with {' or '.join(family[1])}"
        )
    return result


def _mtp_layers(values: Mapping[str, Any]) -> int:
    found = {name: values[name] for name in ("num_nextn_predict_layers", "num_mtp_layers") if name in values}
    counts = {whole_number(name, value) for name, value in found.items() if value is not None}
    if len(counts) > 1:
        raise ConfigError("num_nextn_predict_layers and num_mtp_layers differ")
    return counts.pop() if counts else 0


def _quantization(values: Any) -> Quantization | None:
    if values is None:
        return None
    if not isinstance(values, dict):
        raise ConfigError(f"quantization_config must be an object, not {shown(values)}")
    known = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
        "activation_scheme": "dynamic",
    }
    for name, value in known.items():
        if values.get(name, value) != value:
            raise ConfigError(f"quantization_config.{name} is {shown(values[name])}; only {value!r} is supported")
    if values.get("quant_method") is None:
        raise ConfigError("quantization_config.quant_method is missing; only 'fp8' is supported")
    scale_format = values.get("scale_fmt")
    if scale_format not in (None, "ue8m0", "float"):
        raise ConfigError(f"quantization_config.scale_fmt is {shown(scale_format)}; only ue8m0 is supported")
    return Quantization(power_of_two_scales=scale_format == "ue8m0")
