"""`ModelConfig` holds every number of a model's architecture and checks it when it is set.

Field names are those of the published `config.json` files. Report: sections 2.1 (architecture), 4.2 (values of the
671B model) and 4.3 (YaRN).
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, Literal, get_args

from dsv3_jax.bounds import check_bounds
from dsv3_jax.counts import count_parameters
from dsv3_jax.errors import ConfigError
from dsv3_jax.model_presets import PRESETS

ScoringFunction = Literal["sigmoid", "softmax"]
TopKMethod = Literal["noaux_tc", "greedy", "group_limited_greedy"]

# No published model comes near these sizes: a larger one means that the file is broken.
_LARGEST_DIMENSION = 2**24
_LARGEST_LAYER_COUNT = 4096
_LARGEST_MODEL = 1e14  # parameters
_BOUNDS = {
    "rope_theta": (0.0, 1e15),
    "rms_norm_eps": (0.0, 1.0),
    "latent_norm_eps": (0.0, 1.0),
    "initializer_range": (0.0, 1e3),
    "routed_scaling_factor": (0.0, 1e6),
}
_ROPE_BOUNDS = {
    "factor": (1.0, 1e6),
    "beta_fast": (0.0, 1e6),
    "beta_slow": (0.0, 1e6),
    "mscale": (0.0, 1e3),
    "mscale_all_dim": (0.0, 1e3),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """The settings of YaRN context extension (report section 4.3). When present, YaRN applies at every position.

    Attributes:
      factor: s, extended context length divided by the original one.
      original_max_position_embeddings: context length of pre-training, in tokens.
      beta_fast: a frequency with more rotations than this within the original context is left unchanged.
      beta_slow: a frequency with fewer rotations than this is divided by `factor`. Between `beta_slow` and `beta_fast`
        the two are interpolated linearly.
      mscale: cos and sin are multiplied by m(factor, mscale) / m(factor, mscale_all_dim), where
        m(s, a) = 0.1 a ln(s) + 1.
      mscale_all_dim: the softmax scale of attention is multiplied by m(factor, mscale_all_dim)^2.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def __post_init__(self) -> None:
        check_bounds(self, _ROPE_BOUNDS, "rope_scaling.")
        _check_size("rope_scaling.original_max_position_embeddings", self.original_max_position_embeddings)
        if not self.beta_fast >= self.beta_slow > 0:
            raise ConfigError(
                "rope_scaling.beta_fast must be at least beta_slow, and both positive, "
                f"not {self.beta_fast} and {self.beta_slow}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture of one model. Letters are the report's symbols; all widths count vector elements.

    Attributes:
      vocab_size: V, number of rows of the embedding and of the output head.
      hidden_size: d, width of the hidden state that runs through all layers.
      num_hidden_layers: L, number of transformer layers, not counting the MTP modules.
      first_k_dense_replace: number of leading layers that use a dense feed-forward network instead of experts.
      intermediate_size: hidden width of the dense feed-forward networks.
      num_attention_heads: number of attention heads (n_h).
      q_lora_rank: d_c', rank of the query compression; None projects queries directly from the hidden state.
      kv_lora_rank: d_c, rank of the joint key-value compression, which is what decoding caches.
      qk_nope_head_dim: width per head of the part of queries and keys without position (d_h).
      qk_rope_head_dim: width per head of the part of queries and keys that RoPE rotates (d_h^R); must be even.
      v_head_dim: width per head of the values.
      n_routed_experts: N_r, routed experts per MoE layer.
      n_shared_experts: N_s, shared experts per MoE layer, which every token uses.
      num_experts_per_tok: K_r, routed experts chosen per token.
      moe_intermediate_size: hidden width of one expert.
      n_group: number of equal groups the routed experts are split into for node-limited routing; 1 for no limit.
      topk_group: M, number of groups whose experts a token may use.
      scoring_func: how a token's affinity to an expert is computed: "sigmoid" (V3) or "softmax" (V2).
      topk_method: how experts are chosen: "noaux_tc" (V3: by affinity plus router bias; a group scores the sum of its
        two largest), "greedy" (V2-Lite: by affinity, no groups) or "group_limited_greedy" (V2: by affinity; a group
        scores its largest).
      norm_topk_prob: divide the gates of the chosen experts by their sum.
      routed_scaling_factor: factor that the gates are multiplied by last.
      num_nextn_predict_layers: D, number of multi-token prediction (MTP) modules; 0 for none.
      mtp_hidden_after_final_norm: give the MTP module the main model's hidden state after its final norm, as the
        published weights expect (the report does not say); False gives it the state before that norm.
      max_position_embeddings: longest context, in tokens.
      rope_theta: base of the RoPE frequencies.
      rope_scaling: YaRN settings, or None for plain RoPE.
      rms_norm_eps: epsilon of every RMSNorm except the two on MLA's latents.
      latent_norm_eps: epsilon of the two RMSNorms on MLA's latents. The published code fixes it at 1e-6.
      initializer_range: standard deviation of the initial weights (report section 4.2).
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    first_k_dense_replace: int
    intermediate_size: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    n_group: int = 1
    topk_group: int = 1
    scoring_func: ScoringFunction = "sigmoid"
    topk_method: TopKMethod = "noaux_tc"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    num_nextn_predict_layers: int = 1
    mtp_hidden_after_final_norm: bool = True
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    latent_norm_eps: float = 1e-6
    initializer_range: float = 0.006

    def __post_init__(self) -> None:
        _check_sizes(self)
        _check_choices(self)
        _check_routing(self)
        if self.qk_rope_head_dim % 2:
            raise ConfigError(f"qk_rope_head_dim must be even, since RoPE rotates pairs, not {self.qk_rope_head_dim}")
        if self.first_k_dense_replace > self.num_hidden_layers:
            raise ConfigError(
                f"first_k_dense_replace ({self.first_k_dense_replace}) must not exceed num_hidden_layers "
                f"({self.num_hidden_layers})"
            )
        check_bounds(self, _BOUNDS)
        for name in _BOUNDS:
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, not {getattr(self, name)}")
        if (parameters := self.num_parameters(mtp=True)) > _LARGEST_MODEL:
            raise ConfigError(
                f"a model of hidden_size {self.hidden_size}, {self.num_hidden_layers} layers and "
                f"{self.n_routed_experts} experts has {parameters:.1e} parameters, more than {_LARGEST_MODEL:.0e}"
            )

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> ModelConfig:
        """Returns the configuration called `name` with fields replaced by `overrides`.

        `dsv3_jax.presets()` lists the names.

        Raises:
          ConfigError: there is no such preset or field; the message suggests the nearest names.
        """
        if name not in PRESETS:
            raise ConfigError(f"preset '{name}' does not exist; {_suggest(name, list(PRESETS))}")
        return cls.from_dict(PRESETS[name]).replace(**overrides)

    def replace(self, **overrides: Any) -> ModelConfig:
        """Returns a copy with some fields changed, checked as a whole.

        Raises:
          ConfigError: there is no such field, or the values contradict each other.
        """
        fields = [field.name for field in dataclasses.fields(self)]
        for name in overrides:
            if name not in fields:
                raise ConfigError(f"ModelConfig has no field '{name}'; {_suggest(name, fields)}")
        return dataclasses.replace(self, **overrides)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as nested dictionaries of plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Makes a configuration from what `to_dict` returns.

        Raises:
          ConfigError: a field is unknown or missing; the message names it.
        """
        values = dict(values)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for name in values:
            if name not in fields:
                raise ConfigError(f"ModelConfig has no field '{name}'; {_suggest(name, list(fields))}")
        for name, field in fields.items():
            if name not in values and field.default is dataclasses.MISSING:
                raise ConfigError(f"ModelConfig field '{name}' is missing")
        if isinstance(values.get("rope_scaling"), dict):
            values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
        return cls(**values)

    # Derived sizes -----------------------------------------------------------------------------------------

    @property
    def num_dense_layers(self) -> int:
        """Number of layers with a dense feed-forward network."""
        return self.first_k_dense_replace

    @property
    def num_moe_layers(self) -> int:
        """Number of layers with experts, not counting the MTP modules."""
        return self.num_hidden_layers - self.first_k_dense_replace

    @property
    def qk_head_dim(self) -> int:
        """Width of one head's query and key: the part without position, then the part that RoPE rotates."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def has_router_bias(self) -> bool:
        """Whether experts are chosen with the router bias of auxiliary-loss-free balancing (eq. 16)."""
        return self.topk_method == "noaux_tc" and self.num_moe_layers + self.num_nextn_predict_layers > 0

    # Counts (`dsv3_jax.counts` has them term by term) -------------------------------------------------------

    def num_parameters(self, *, mtp: bool = False) -> int:
        """Returns the number of parameters, router biases included.

        Args:
          mtp: also count the parameters that only the MTP modules have.
        """
        counts = count_parameters(self)
        return counts.total + (counts.mtp_total if mtp else 0)

    def num_active_parameters(self) -> int:
        """Returns the parameters of the main model that one token uses, embedding and head included (671B: 37B)."""
        return count_parameters(self).active


def _check_size(name: str, value: Any, smallest: int = 1, largest: int = _LARGEST_DIMENSION) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} must be a whole number, not {value!r}")
    if not smallest <= value <= largest:
        raise ConfigError(f"{name} must be between {smallest} and {largest}, not {value}")


def _check_sizes(config: ModelConfig) -> None:
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "n_routed_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "n_group",
        "topk_group",
        "max_position_embeddings",
    ):
        _check_size(name, getattr(config, name))
    if config.q_lora_rank is not None:
        _check_size("q_lora_rank", config.q_lora_rank)
    _check_size("num_hidden_layers", config.num_hidden_layers, 1, _LARGEST_LAYER_COUNT)
    _check_size("first_k_dense_replace", config.first_k_dense_replace, 0, _LARGEST_LAYER_COUNT)
    _check_size("n_shared_experts", config.n_shared_experts, 0)
    _check_size("num_nextn_predict_layers", config.num_nextn_predict_layers, 0, _LARGEST_LAYER_COUNT)


def _check_choices(config: ModelConfig) -> None:
    for name, kind in (("scoring_func", ScoringFunction), ("topk_method", TopKMethod)):
        allowed = get_args(kind)
        value = getattr(config, name)
        if value not in allowed:
            raise ConfigError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")


def _check_routing(config: ModelConfig) -> None:
    experts, groups, kept = config.n_routed_experts, config.n_group, config.topk_group
    if experts % groups:
        raise ConfigError(f"n_routed_experts ({experts}) must be a multiple of n_group ({groups})")
    if kept > groups:
        raise ConfigError(f"topk_group ({kept}) must not exceed n_group ({groups})")
    reachable = kept * (experts // groups)
    if config.num_experts_per_tok > reachable:
        raise ConfigError(
            f"num_experts_per_tok ({config.num_experts_per_tok}) must not exceed the {reachable} experts that "
            f"topk_group ({kept}) of n_group ({groups}) groups hold"
        )
    if config.topk_method == "noaux_tc" and groups > 1 and experts // groups < 2:
        raise ConfigError(
            f"n_group ({groups}) must leave at least 2 of the n_routed_experts ({experts}) in a group, since "
            "noaux_tc scores a group by its two best"
        )
    if config.topk_method == "greedy" and groups != 1:
        raise ConfigError(f"topk_method greedy uses no groups: n_group must be 1, not {groups}")


def _suggest(name: str, choices: list[str]) -> str:
    near = difflib.get_close_matches(name, choices, n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(choices)}"
