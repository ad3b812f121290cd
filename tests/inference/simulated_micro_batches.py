"""Reads prompts as two micro-batches on eight simulated devices, and prints as JSON what is overlapped and the text."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from hlo_graph import Program
from small_models import small_model

from dsv3_jax.config import ModelConfig
from dsv3_jax.inference import Engine, EngineConfig, Request, programs
from dsv3_jax.inference.batches import chunk_of
from dsv3_jax.sharding.mesh import MeshConfig, make_mesh
from dsv3_jax.sharding.moved_model import on_devices
from dsv3_jax.sharding.on_mesh import OnMesh

VOCABULARY = 12
SETTINGS: dict[str, Any] = {"max_sequences": 8, "context": 64, "page_size": 4, "chunk_sizes": (16,), "steps": 3}


def main() -> None:
    config = ModelConfig.preset("tiny", vocab_size=VOCABULARY, initializer_range=0.25, num_hidden_layers=4)
    model = small_model(config, 3)
    random = np.random.default_rng(0)
    requests = [
        Request(prompt=tuple(random.integers(0, VOCABULARY, length).tolist()), max_new_tokens=8)
        for length in (1, 9, 17, 30)
    ]
    want = Engine(model, EngineConfig(**SETTINGS, drafts=1, compile_at_start=False)).run(requests)
    mesh = OnMesh(make_mesh(MeshConfig(data=2, expert=4)))
    settings = EngineConfig(**SETTINGS, drafts=1, micro_batches=2, compile_at_start=False)
    engine = Engine(on_devices(model, mesh), settings)
    got = engine.run(requests)

    arguments = engine._graph, engine._weights, engine._pages, engine._slots, chunk_of([], 16, engine.sizes)
    compiled = programs.read_chunk.lower(*arguments, scored=False, micro_batches=2).compile()
    program = Program(compiled.as_text() or "", ["micro_batch_1", "micro_batch_2"])
    print(
        json.dumps(
            {
                "rows": engine.sizes.chunk_rows,
                "same_text": [a.tokens for a in got] == [b.tokens for b in want],
                "dependences": sorted(program.dependences()),
            }
        )
    )


if __name__ == "__main__":
    main()
