"""Runs an engine on two sets of four simulated devices, and prints, as JSON, how it compares to one on one device."""

from __future__ import annotations

import json
from typing import Any
from unittest import mock

import jax
import numpy as np
from small_models import small_model

from dsv3_jax.config import ModelConfig
from dsv3_jax.inference import DeviceSets, Engine, EngineConfig, Request, Result, Sampler, redundancy
from dsv3_jax.inference.prefill_set import Arriving
from dsv3_jax.serving.metrics import Metrics
from dsv3_jax.sharding.mesh import MeshConfig

VOCABULARY = 12
SETTINGS: dict[str, Any] = {"max_sequences": 4, "context": 64, "page_size": 2, "chunk_sizes": (8,), "steps": 3}
SETS = DeviceSets(
    prefill=MeshConfig(expert=2, tensor=2), decode=MeshConfig(data=-1, expert=2), prefill_redundant_experts=4
)
APART = {"sets": SETS, "redundant_experts": 2, "requests_per_placement": 4, "record_experts": True}


def texts(results: list[Result]) -> list[list[int]]:
    return [result.tokens for result in results]


def copies(weights: Any) -> np.ndarray:
    return np.asarray(weights["moe_blocks"]["feed_forward"]["experts"]["copies"][...])


def main() -> None:
    config = ModelConfig.preset("tiny", vocab_size=VOCABULARY, initializer_range=0.25)
    model, other = small_model(config, 3), small_model(config, 4)
    random = np.random.default_rng(0)
    requests = [
        Request(
            prompt=tuple(random.integers(0, VOCABULARY, length).tolist()),
            max_new_tokens=12,
            sampler=Sampler(temperature=0.5 * (length % 2), presence_penalty=0.1 * (length % 2)),
            top_logprobs=0,
        )
        for length in (1, 2, 21, 17, 24, 46, 9)
    ]
    requests += [Request(prompt=requests[5].prompt, max_new_tokens=12, top_logprobs=0)]  # shares pages
    one = Engine(
        model, EngineConfig(**SETTINGS, drafts=1, record_experts=True, compile_at_start=False, tiled_weights=False)
    )
    want = one.run(requests)
    one.update(other)
    want_of_other = one.run(requests[:4])

    # 32 pages in either cache, of which the longest request needs 29.
    engine = Engine(model, EngineConfig(**SETTINGS, **APART, drafts=1, cache_tokens=64))
    prefill = engine.prefill
    assert prefill is not None
    first = copies(engine._weights), copies(prefill._weights)
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled.append(name) if "backend_compile" in name else None
    )

    # The second prompt is read, and does not arrive: the first request, which has no prompt to read, goes on.
    number, second = (engine.submit(request) for request in requests[:2])
    with mock.patch.object(Arriving, "is_there", False):
        outputs = [output for _ in range(6) for output in engine.step()]
        metrics = Metrics()
        metrics.record_engine(engine)
    alone = [token for output in outputs for token in output.tokens]
    held = [each.allocator.held for each in engine.schedulers]
    engine.cancel(second)
    released = [each.allocator.held for each in engine.schedulers]

    with mock.patch.object(redundancy, "with_redundant_experts", wraps=redundancy.with_redundant_experts) as place:
        got = engine.run(requests)
    placed_by = {call.args[1]: int(call.args[2].sum()) for call in place.call_args_list}
    last = copies(engine._weights), copies(prefill._weights)
    placed_again = [not np.array_equal(*pair) for pair in zip(first, last, strict=True)]
    preemptions, reused = engine.statistics.preemptions, engine.statistics.reused_tokens

    # Requests are cancelled wherever they are.
    numbers = [engine.submit(request) for request in requests]
    for step, number in enumerate(random.permutation(numbers)):
        engine.cancel(number)
        for _ in range(step % 3):
            engine.step()
    left_over = engine.has_work or [each.allocator.held for each in engine.schedulers] != [0, 0]

    engine.update(other)
    got_of_other = engine.run(requests[:4])
    print(
        json.dumps(
            {
                "same_text": texts(got) == texts(want),
                "same_experts": all(np.array_equal(a.experts, b.experts) for a, b in zip(got, want, strict=True)),
                "error": max(
                    abs(x.logprob - y.logprob)
                    for a, b in zip(got, want, strict=True)
                    for x, y in zip(a.logprobs, b.logprobs, strict=True)
                ),
                "same_text_of_new_weights": texts(got_of_other) == texts(want_of_other),
                "went_on_alone": alone == want[0].tokens,
                "held": held,
                "released": released,
                "left_over": left_over,
                "preemptions": preemptions,
                "reused": reused,
                "placed_again": placed_again,
                "placed_by": placed_by,
                "compilations": len(compiled),
                "metrics": [line for line in metrics.text().splitlines() if line.startswith("dsv3_set")],
            }
        )
    )


if __name__ == "__main__":
    main()
