"""Checks that prompts are read alike as two micro-batches, neither of which waits for the exchange of the other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hlo_graph import Program
from simulated import run_simulated
from small_models import small_model

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import ConfigError
from dsv3_jax.inference import Engine, EngineConfig, Request
from dsv3_jax.inference.engine_config import Sizes

# A layer in which the second product waits for the first exchange, and the exchange of a loop's body does not.
PROGRAM = """HloModule layer

%body.1 (p.1: f32[8]) -> f32[8] {
  %p.1 = f32[8]{0} parameter(0)
  ROOT %a.1 = f32[8]{0} all-to-all(%p.1), dimensions={0}, metadata={op_name="jit(f)/two/experts/all_to_all"}
}

ENTRY %main (x.1: f32[8], x.2: f32[8]) -> f32[8] {
  %x.1 = f32[8]{0} parameter(0)
  %a.2 = f32[8]{0} all-to-all(%x.1), dimensions={0}, metadata={op_name="jit(f)/one/experts/all_to_all"}
  %d.1 = f32[8]{0} dot(%a.2, %x.1), metadata={op_name="jit(f)/one/experts/dot_general"}
  %w.1 = f32[8]{0} while(%x.2), condition=%cond.1, body=%body.1
  %f.1 = f32[8]{0} add(%w.1, %d.1)
  ROOT %d.2 = f32[8]{0} dot(%x.1, %f.1), metadata={op_name="jit(f)/two/attention/dot_general"}
}
"""


def test_dependences_are_found() -> None:
    assert Program(PROGRAM, ["one", "two"]).dependences() == {("one", "one"), ("one", "two"), ("two", "two")}
    apart = PROGRAM.replace("add(%w.1, %d.1)", "add(%w.1, %w.1)")
    assert Program(apart, ["one", "two"]).dependences() == {("one", "one"), ("two", "two")}


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_neither_micro_batch_waits_for_the_exchange_of_the_other() -> None:
    """In the compiled program no product of one needs a result of the other's dispatch or combine."""
    result = run_simulated(Path(__file__).with_name("simulated_micro_batches.py"))
    assert result["same_text"]
    assert result["rows"] == 16
    assert result["dependences"] == [[f"micro_batch_{number}"] * 2 for number in (1, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("dense", [0, 1, 3])
def test_every_bit_is_that_of_one_batch(dense: int) -> None:
    """With experts recorded, whatever the layers are; prompts of one token and of several chunks."""
    layers = {"num_hidden_layers": 3, "first_k_dense_replace": dense}
    config = ModelConfig.preset("tiny", vocab_size=12, initializer_range=0.25, **layers)
    model = small_model(config, 3)
    random = np.random.default_rng(0)
    requests = [
        Request(prompt=tuple(random.integers(0, 12, length).tolist()), max_new_tokens=6, top_logprobs=2)
        for length in (1, 9, 20)
    ]
    settings = {"max_sequences": 4, "context": 32, "page_size": 4, "chunk_sizes": (8,), "chunk_rows": 3}

    def results(micro_batches: int) -> list:
        config = EngineConfig(**settings, micro_batches=micro_batches, record_experts=True, compile_at_start=False)
        engine = Engine(model, config)
        assert engine.sizes.chunk_rows == (4 if micro_batches == 2 else 3)
        return [engine.run(requests), engine.expert_load]

    (got, load), (want, other) = results(2), results(1)
    np.testing.assert_array_equal(load, other)
    for mine, own in zip(got, want, strict=True):
        np.testing.assert_array_equal(mine.experts, own.experts)
        assert (mine.tokens, mine.logprobs) == (own.tokens, own.logprobs)


def test_there_are_one_or_two() -> None:
    with pytest.raises(ConfigError, match=r"engine\.micro_batches must be 1 or 2, not 3"):
        EngineConfig(micro_batches=3)


def test_no_more_prompts_are_read_together_than_there_are_slots() -> None:
    model = small_model(ModelConfig.preset("tiny", num_nextn_predict_layers=0), 0)
    for slots, rows in ((1, 1), (2, 2), (8, 2)):
        assert Sizes.of(EngineConfig(max_sequences=slots), model).chunk_rows == rows
