"""Runs the engine on a mesh of eight simulated devices and prints, as JSON, how its texts compare to one device's."""

from __future__ import annotations

import json

import jax
import numpy as np
from flax import nnx
from small_models import small_model

from dsv3_jax.config import ModelConfig
from dsv3_jax.inference import Engine, EngineConfig, Request, Sampler
from dsv3_jax.sharding.mesh import MeshConfig, make_mesh
from dsv3_jax.sharding.on_mesh import OnMesh

VOCABULARY = 12


def main() -> None:
    config = ModelConfig.preset("tiny", vocab_size=VOCABULARY, initializer_range=0.25)
    settings = {"max_sequences": 4, "context": 64, "page_size": 4, "chunk_sizes": (8,), "steps": 3, "drafts": 1}
    random = np.random.default_rng(0)
    requests = [
        Request(
            prompt=tuple(random.integers(0, VOCABULARY, length).tolist()),
            max_new_tokens=12,
            sampler=Sampler(temperature=0.5 * (length % 2)),
            top_logprobs=0,
        )
        for length in (1, 2, 9, 17, 30, 21)
    ]
    one = Engine(small_model(config, 3), EngineConfig(**settings, compile_at_start=False, tiled_weights=False))
    want = one.run(requests)

    model = small_model(config, 3, devices=OnMesh(make_mesh(MeshConfig(data=2, expert=2, tensor=2))))
    state = nnx.state(model)
    nnx.update(model, jax.device_put(state, model.devices.shardings(state)))
    redundancy = {"redundant_experts": 2, "requests_per_placement": 4}
    engine = Engine(model, EngineConfig(**settings, **redundancy))
    compiled: list[str] = []
    first = engine._weights
    engine._own(model)  # compiles what placing needs
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled.append(name) if "backend_compile" in name else None
    )
    got = engine.run(requests)
    counts = [each["moe_blocks"]["feed_forward"]["experts"]["counts"][...] for each in (first, engine._weights)]
    print(
        json.dumps(
            {
                "same_text": [a.tokens == b.tokens for a, b in zip(got, want, strict=True)],
                "error": max(
                    abs(x.logprob - y.logprob)
                    for a, b in zip(got, want, strict=True)
                    for x, y in zip(a.logprobs, b.logprobs, strict=True)
                ),
                "compilations": len(compiled),
                "load": bool((engine.expert_load.sum(axis=1) == one.expert_load.sum(axis=1)).all()),
                "shards": len(engine._weights["head"]["weight"].get_value().sharding.device_set),
                "placed_again": not np.array_equal(*counts),
                "free_pages": engine.free_pages == engine.sizes.pages,
            }
        )
    )


if __name__ == "__main__":
    main()
