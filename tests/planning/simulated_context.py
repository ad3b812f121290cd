"""Compiles a step whose sequences are divided over eight simulated devices. Prints bytes of its collectives as JSON."""

from __future__ import annotations

import json

import jax

from dsv3_jax.config import ModelConfig
from dsv3_jax.planning.abstract_step import traced_step
from dsv3_jax.planning.activations import latent_bytes
from dsv3_jax.planning.collectives import read_collectives
from dsv3_jax.planning.config import PlanConfig
from dsv3_jax.planning.hardware import local_target
from dsv3_jax.sharding.mesh import MeshConfig


def main() -> None:
    model = ModelConfig.preset(
        "tiny", num_attention_heads=8, num_hidden_layers=2, hidden_size=128, max_position_embeddings=2048
    )
    config = PlanConfig(
        model=model,
        target=local_target(),
        mesh=MeshConfig(context=8),
        sequence_length=2048,
        precision="float32",
        micro_batch_size=2,
    )
    collectives = read_collectives(traced_step(config, jax.devices()).lower().compile().as_text())
    layers = model.num_hidden_layers + model.num_nextn_predict_layers
    width = (
        model.num_attention_heads * model.v_head_dim * layers + model.hidden_size
    )  # outputs, and rows of the embedding
    found = {
        "exchanged": sum(item.sent for item in collectives if item.kind == "all-to-all"),
        "outputs and embeddings": 2 * config.tokens_per_pass * width * 4 * 7 / 8,
        "largest": max(item.largest for item in collectives),
        "latents": latent_bytes(config),
        "hidden states": 8 * config.hidden_bytes,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
