"""Makes the golden data from seeds, or recomputes it for stored weights, with the transformers library.

Runs in an environment of its own (`make test-oracle` creates it: torch, transformers, safetensors; no JAX):

    python tests/oracle/make_golden.py make tests/golden        # the cases below, from configuration and seed
    python tests/oracle/make_golden.py check tests/golden/*/    # recompute io.safetensors, print differences

A checkpoint is `config.json` and `model.safetensors` in the published layout, the MTP layer included; what it
computes is `io.safetensors`. tests/golden/README.md says what each tensor of it is.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    logging,
)
from transformers.modeling_layers import MtpLayer

ROWS, LENGTH, PROMPT, GREEDY = 3, 48, 16, 32

_COMMON = {
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.1,
    "intermediate_size": 64,
    "kv_lora_rank": 16,
    "max_position_embeddings": 128,
    "moe_intermediate_size": 16,
    "moe_layer_freq": 1,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "v_head_dim": 12,
    "vocab_size": 128,
}
_YARN = {
    "type": "yarn",
    "factor": 8.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.707,
    # Shorter than the rows, so that most positions are beyond it.
    "original_max_position_embeddings": 16,
}
_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "num_nextn_predict_layers": 1,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}
_V2 = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "norm_topk_prob": False,
    "scoring_func": "softmax",
}

# name: (configuration, seed, mean and standard deviation of the router biases)
CASES = {
    # Every biased affinity is negative, so filling masked groups with 0 instead of -inf picks other experts;
    # mscale and mscale_all_dim differ; the latents' epsilon (1e-6) differs from the other norms'.
    "v3_negative_bias": (
        {
            **_COMMON,
            **_V3,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 4,
            "q_lora_rank": 24,
            "rms_norm_eps": 1e-3,
            "rope_scaling": _YARN,
            "routed_scaling_factor": 2.5,
        },
        11,
        (-1.5, 0.3),
    ),
    "v2_groups": (
        {
            **_COMMON,
            **_V2,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 3,
            "n_shared_experts": 2,
            "q_lora_rank": 24,
            "rms_norm_eps": 1e-6,
            "rope_scaling": {**_YARN, "mscale": 0.707},
            "routed_scaling_factor": 16.0,
            "topk_method": "group_limited_greedy",
        },
        12,
        None,
    ),
    "v2_lite": (
        {
            **_COMMON,
            **_V2,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 3,
            "n_shared_experts": 2,
            "q_lora_rank": None,
            "rms_norm_eps": 1e-6,
            "rope_scaling": None,
            "routed_scaling_factor": 1.0,
            "topk_method": "greedy",
        },
        13,
        None,
    ),
}


class Oracle(torch.nn.Module):
    """transformers' main model and, for V3, its MTP layer, which the library only runs inside `generate`."""

    def __init__(self, config: dict):
        super().__init__()
        v3 = config["model_type"] == "deepseek_v3"
        self.config = (DeepseekV3Config if v3 else DeepseekV2Config)(**config)
        self.config._attn_implementation = "eager"
        self.config._experts_implementation = "eager"
        self.main = (DeepseekV3ForCausalLM if v3 else DeepseekV2ForCausalLM)(self.config)
        self.mtp = None
        if config.get("num_nextn_predict_layers"):
            layer = self.main.model.layers[-1]
            self.mtp = MtpLayer(self.config, type(layer), type(layer.input_layernorm), self.config.num_hidden_layers)
        self.eval()

    def logits(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns logits [B, T, V] and the hidden states [B, T, d] after the final norm."""
        hidden = self.main.model(ids, use_cache=False).last_hidden_state
        return self.main.lm_head(hidden), hidden

    def mtp_logits(self, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Returns [B, T-1, V]; position i sees hidden state i and the embedding of token i + 1."""
        length = ids.shape[1] - 1
        positions = torch.arange(length)[None]
        causal = torch.full((length, length), -torch.inf).triu(1)[None, None]
        output = self.mtp(
            inputs_embeds=self.main.model.embed_tokens(ids[:, 1:]),
            previous_hidden_state=hidden[:, :-1],
            position_embeddings=self.main.model.rotary_emb(hidden, positions),
            attention_mask=causal,
            position_ids=positions,
            past_key_values=None,
        )
        return self.main.lm_head(output)


# Names ------------------------------------------------------------------------------------------------------


def _published_name(name: str, layers: int) -> str:
    """Returns the published name of a parameter of `Oracle`, experts still fused."""
    if name.startswith("main."):
        return name.removeprefix("main.")
    inner = name.removeprefix("mtp.").removeprefix("mtp_block.")
    return f"model.layers.{layers}.{inner.replace('post_norm.', 'shared_head.norm.')}"


def published_weights(oracle: Oracle) -> dict[str, torch.Tensor]:
    """Returns every weight by its published name: experts one by one, MTP's copies of embedding and head included."""
    layers = oracle.config.num_hidden_layers
    weights = {}
    for name, value in oracle.state_dict().items():
        name = _published_name(name, layers)
        stem, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for expert, (gate, up) in enumerate(part.chunk(2) for part in value):
                weights[f"{stem}.{expert}.gate_proj.weight"] = gate.clone()
                weights[f"{stem}.{expert}.up_proj.weight"] = up.clone()
        elif last == "down_proj":
            for expert, down in enumerate(value):
                weights[f"{stem}.{expert}.down_proj.weight"] = down.clone()
        else:
            weights[name] = value.clone()
    if oracle.mtp is not None:
        weights[f"model.layers.{layers}.embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
        weights[f"model.layers.{layers}.shared_head.head.weight"] = weights["lm_head.weight"].clone()
    return weights


def load_weights(oracle: Oracle, weights: dict[str, torch.Tensor]) -> None:
    """Loads what `published_weights` returns; every parameter must be found and have its shape."""
    layers = oracle.config.num_hidden_layers
    state = {}
    for name in oracle.state_dict():
        published = _published_name(name, layers)
        stem, _, last = published.rpartition(".")
        if last in ("gate_up_proj", "down_proj"):
            count = oracle.config.n_routed_experts
            parts = ("gate_proj", "up_proj") if last == "gate_up_proj" else ("down_proj",)
            state[name] = torch.stack(
                [torch.cat([weights[f"{stem}.{e}.{part}.weight"] for part in parts]) for e in range(count)]
            )
        else:
            state[name] = weights[published]
    oracle.load_state_dict(state)


# Values -----------------------------------------------------------------------------------------------------


def randomise(oracle: Oracle, seed: int, biases: tuple[float, float] | None) -> None:
    """Draws every weight, buffers included: transformers leaves the MTP layer's experts and router unset."""
    generator = torch.Generator().manual_seed(seed)

    def normal(value: torch.Tensor, mean: float, deviation: float) -> None:
        value.copy_(mean + deviation * torch.randn(value.shape, generator=generator))

    with torch.no_grad():
        for name, value in sorted(oracle.state_dict().items()):
            if name.endswith("e_score_correction_bias"):
                normal(value, *biases)
            elif "norm" in name:
                normal(value, 1.0, 0.2)
            elif name.endswith("gate.weight"):
                # Large enough that affinities differ: at the other weights' scale the biases alone would choose.
                normal(value, 0.0, 0.5)
            else:
                normal(value, 0.0, oracle.config.initializer_range)


def random_ids(vocab_size: int, seed: int) -> torch.Tensor:
    """Returns int64 [ROWS, LENGTH], without the ids of begin and end."""
    return torch.randint(2, vocab_size, (ROWS, LENGTH), generator=torch.Generator().manual_seed(seed))


def compute_io(oracle: Oracle, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the tensors of io.safetensors."""
    logits, hidden = oracle.logits(ids)
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    oracle.zero_grad()
    loss.backward()
    layers = oracle.main.model.layers
    values = {
        "ids": ids,
        "logits": logits,
        "loss": loss[None],
        "grad.embed": oracle.main.model.embed_tokens.weight.grad,
        "grad.kv_a_proj.0": layers[0].self_attn.kv_a_proj_with_mqa.weight.grad,
        "grad.kv_b_proj.1": layers[1].self_attn.kv_b_proj.weight.grad,
        "grad.o_proj.2": layers[2].self_attn.o_proj.weight.grad,
        "grad.router.2": layers[2].mlp.gate.weight.grad,
    }
    with torch.no_grad():
        if oracle.mtp is not None:
            values["mtp_logits"] = oracle.mtp_logits(ids, hidden)
        greedy = ids[:1, :PROMPT]
        for _ in range(GREEDY):
            greedy = torch.cat([greedy, oracle.logits(greedy)[0][:, -1:].argmax(-1)], dim=1)
        values["greedy"] = greedy
    return {name: value.detach().contiguous() for name, value in values.items()}


# Commands ---------------------------------------------------------------------------------------------------


def make(folder: Path) -> None:
    """Writes every case of CASES into `folder`."""
    for name, (config, seed, biases) in CASES.items():
        oracle = Oracle(config)
        randomise(oracle, seed, biases)
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        (target / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
        save_file(published_weights(oracle), target / "model.safetensors", metadata={"format": "pt"})
        values = compute_io(oracle, random_ids(config["vocab_size"], seed))
        save_file(values, target / "io.safetensors", metadata={"format": "pt"})


def check(folders: list[Path]) -> dict[str, dict[str, float]]:
    """Returns the largest absolute difference of every stored tensor from the recomputed one, by folder and name."""
    report = {}
    for folder in folders:
        oracle = Oracle(json.loads((folder / "config.json").read_text()))
        load_weights(oracle, load_file(folder / "model.safetensors"))
        stored = load_file(folder / "io.safetensors")
        again = compute_io(oracle, stored["ids"])
        if stored.keys() != again.keys():
            raise SystemExit(f"{folder}: io.safetensors holds {sorted(stored)}, recomputed {sorted(again)}")
        report[folder.name] = {name: float((stored[name] - again[name]).abs().max()) for name in sorted(stored)}
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("make").add_argument("folder", type=Path)
    commands.add_parser("check").add_argument("folders", type=Path, nargs="+")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    # One thread: the order of sums, hence the last bit, does not depend on the machine's core count.
    torch.set_num_threads(1)
    if arguments.command == "make":
        make(arguments.folder)
    else:
        print(json.dumps(check(arguments.folders), indent=1))


if __name__ == "__main__":
    main()
