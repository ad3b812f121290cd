"""What transformers does with checkpoints: runs in the oracle's environment, without JAX.

    python transformers_side.py FILE

FILE is JSON: a list of jobs {"make": FOLDER, "config": {...}, "seed": N} (a random checkpoint saved by transformers
itself) and {"check": FOLDER} (load a checkpoint with transformers' own loader). Every job writes FOLDER/io.safetensors
with `ids` [2, T] and `logits` [2, T, V]. Last comes one JSON line of the problems found while loading.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    logging,
)

LENGTH = 24


def make(folder: Path, config: dict, seed: int) -> None:
    """A checkpoint with random weights, saved by the library."""
    v3 = config["model_type"] == "deepseek_v3"
    settings = (DeepseekV3Config if v3 else DeepseekV2Config)(**config)
    model = (DeepseekV3ForCausalLM if v3 else DeepseekV2ForCausalLM)(settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in sorted(model.state_dict().items()):
            centre, spread = (1.0, 0.2) if "norm" in name else (0.0, 0.15)
            if name.endswith("e_score_correction_bias"):
                centre, spread = -0.8, 0.4
            elif name.endswith("gate.weight"):
                spread = 0.5
            value.copy_(centre + spread * torch.randn(value.shape, generator=generator))
    model.save_pretrained(folder, max_shard_size="100KB")
    write_io(model, folder, seed)


def check(folder: Path) -> dict[str, list[str]]:
    """Logits by the library's own loader, and the names it could not place (MTP layers, which it has no room for)."""
    model, notes = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    write_io(model, folder, 0)
    return {key: sorted(map(str, notes[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}


def write_io(model: torch.nn.Module, folder: Path, seed: int) -> None:
    model.eval()
    model.config._attn_implementation = "eager"
    model.config._experts_implementation = "eager"  # the grouped product wants widths that are multiples of 16 bytes
    generator = torch.Generator().manual_seed(seed + 1)
    length = min(LENGTH, model.config.max_position_embeddings)
    ids = torch.randint(0, model.config.vocab_size, (2, length), generator=generator)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    save_file({"ids": ids, "logits": logits.float().contiguous()}, folder / "io.safetensors")


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    problems = []
    for job in json.loads(Path(sys.argv[1]).read_text()):
        if "make" in job:
            make(Path(job["make"]), job["config"], job["seed"])
            problems.append({})
        else:
            problems.append(check(Path(job["check"])))
    print(json.dumps(problems))


if __name__ == "__main__":
    main()
