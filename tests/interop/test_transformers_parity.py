"""Against transformers itself, both ways: what it saves loads and matches; what we save loads there and matches.

Configurations are drawn over every architectural field. The library's start-up costs seconds, so many configurations
share one process.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import dsv3_jax as dsv3
from dsv3_jax.cli.main import main
from dsv3_jax.interop.hf_config import from_published

ROOT = Path(__file__).parents[2]
CONFIGURATIONS = 10
pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore:.*without MTP")]


@pytest.fixture(scope="module")
def oracle() -> str:
    """The interpreter that has torch and transformers."""
    named = os.environ.get("DSV3_ORACLE_PYTHON") or str(ROOT / ".venv-oracle" / "bin" / "python")
    if not Path(named).exists():
        pytest.skip("no torch and transformers: run `make test-oracle`, or set DSV3_ORACLE_PYTHON")
    return named


def run_transformers(python: str, jobs: list[dict[str, Any]], folder: Path) -> list[dict[str, list[str]]]:
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [python, str(Path(__file__).parent / "transformers_side.py"), str(folder / "jobs.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check_logits(model: dsv3.DeepSeekV3, folder: Path) -> None:
    """Our logits against the library's: float32 sums in another order, through a few layers."""
    io = load_file(folder / "io.safetensors")
    graph, state = nnx.split(model)
    logits = jax.jit(lambda state, ids: nnx.merge(graph, state)(ids).logits)(state, jnp.asarray(io["ids"], jnp.int32))
    scale = max(1.0, float(np.abs(io["logits"]).max()))
    np.testing.assert_allclose(logits, io["logits"], rtol=0, atol=2e-5 * scale)


@st.composite
def published_configs(draw: st.DrawFn) -> dict[str, Any]:
    """Small architectures over every field that changes what is computed."""
    v3 = draw(st.booleans())
    groups = draw(st.sampled_from([1, 2, 4]))
    limited = not v3 and groups > 1
    in_group = draw(st.integers(2, 4))
    kept = draw(st.integers(1, groups)) if v3 or limited else 1
    layers = draw(st.integers(1, 3))
    yarn = draw(st.booleans())
    temperature = draw(st.sampled_from([0.707, 1.0]))
    config: dict[str, Any] = {
        "model_type": "deepseek_v3" if v3 else "deepseek_v2",
        "vocab_size": draw(st.integers(40, 90)),
        "hidden_size": 12 * draw(st.integers(1, 4)),  # divisible by every number of heads: checked there
        "num_hidden_layers": layers,
        "first_k_dense_replace": draw(st.integers(0, layers)),
        "intermediate_size": draw(st.integers(3, 40)),
        "moe_intermediate_size": draw(st.integers(3, 20)),
        "num_attention_heads": draw(st.integers(1, 4)),
        "q_lora_rank": draw(st.sampled_from([None, 5, 12, 20])),
        # Even, since deepseek_v2 there views the rotary parts as complex numbers where they lie.
        "kv_lora_rank": 2 * draw(st.integers(2, 10)),
        "qk_nope_head_dim": 2 * draw(st.integers(2, 6)),
        "qk_rope_head_dim": 2 * draw(st.integers(1, 6)),
        "v_head_dim": draw(st.integers(3, 12)),
        "n_routed_experts": groups * in_group,
        "n_shared_experts": draw(st.integers(1, 2)),
        "num_experts_per_tok": draw(st.integers(1, kept * in_group if v3 or limited else groups * in_group)),
        "n_group": groups,
        "topk_group": kept,
        "norm_topk_prob": v3 and draw(st.booleans()),
        "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5, 16.0])),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-3])),
        "rope_theta": draw(st.sampled_from([10000.0, 50000.0])),
        "max_position_embeddings": 256,
        "rope_scaling": None,
        "tie_word_embeddings": False,
    }
    config["num_key_value_heads"] = config["num_attention_heads"]
    if v3:
        config["rope_interleave"] = draw(st.booleans())
    else:
        config["topk_method"] = "group_limited_greedy" if limited else "greedy"
    if yarn:
        config["rope_scaling"] = {
            "type": "yarn",
            "rope_type": "yarn",
            "factor": draw(st.sampled_from([1.0, 4.0, 40.0])),
            "original_max_position_embeddings": draw(st.sampled_from([8, 64])),
            "beta_fast": draw(st.sampled_from([32, 4, 1])),
            "beta_slow": 1,
            "mscale": temperature,
            "mscale_all_dim": draw(st.sampled_from([temperature, 1.0])),
        }
    return config


def draw_configs(count: int) -> list[dict[str, Any]]:
    """`count` distinct configurations; always the same ones."""
    found: list[dict[str, Any]] = []

    @seed(20260)
    @settings(max_examples=200, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(published_configs())
    def collect(config: dict[str, Any]) -> None:
        if config not in found:
            found.append(config)

    collect()
    # Neighbouring draws resemble each other.
    return random.Random(3).sample(found, count)


@pytest.fixture(scope="module")
def made_there(oracle: str, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Random checkpoints written by transformers."""
    folder = tmp_path_factory.mktemp("made_there")
    jobs = [
        {"make": str(folder / str(number)), "config": config, "seed": number}
        for number, config in enumerate(draw_configs(CONFIGURATIONS))
    ]
    run_transformers(oracle, jobs, folder)
    return [Path(job["make"]) for job in jobs]


def test_what_transformers_saves_loads_and_matches(made_there: list[Path]) -> None:
    for folder in made_there:
        check_logits(dsv3.load_hf(folder), folder)


def test_what_we_save_loads_in_transformers_and_matches(made_there: list[Path], oracle: str, tmp_path: Path) -> None:
    """The same weights after a trip through us, MTP modules added where V3 has them."""
    jobs, models = [], []
    for number, folder in enumerate(made_there):
        model = dsv3.load_hf(folder)
        if number % 2 and model.config.topk_method == "noaux_tc":
            model = with_random_mtp(model)
        dsv3.save_hf(model, tmp_path / str(number), max_shard_bytes=30_000)
        jobs.append({"check": str(tmp_path / str(number))})
        models.append(model)
    problems = run_transformers(oracle, jobs, tmp_path)
    for job, model, found in zip(jobs, models, problems, strict=True):
        main_layers = model.config.num_hidden_layers
        assert found["missing_keys"] == found["mismatched_keys"] == []
        assert all(f"layers.{main_layers}." in name for name in found["unexpected_keys"])
        check_logits(model, Path(job["check"]))


def with_random_mtp(model: dsv3.DeepSeekV3) -> dsv3.DeepSeekV3:
    from dsv3_jax.interop.parameter_tree import arrays, with_arrays
    from dsv3_jax.model import abstract_model

    larger = abstract_model(model.config.replace(num_nextn_predict_layers=1))
    rng = np.random.default_rng(0)
    drawn = {path: jnp.asarray(rng.standard_normal(value.shape, np.float32)) for path, value in arrays(larger).items()}
    return with_arrays(larger, drawn | arrays(model))


def test_drawn_configurations_cover_the_fields() -> None:
    """The draws above are fixed by their seed; this says that they reach what matters."""
    models = [from_published(config).model for config in draw_configs(CONFIGURATIONS)]
    for name in (
        "topk_method",
        "q_lora_rank",
        "n_group",
        "topk_group",
        "first_k_dense_replace",
        "n_shared_experts",
        "norm_topk_prob",
        "rms_norm_eps",
        "rope_theta",
        "routed_scaling_factor",
        "num_attention_heads",
    ):
        assert len({getattr(model, name) for model in models}) >= 2, name
    assert {model.rope_scaling is None for model in models} == {True, False}
    assert {c.get("rope_interleave") for c in draw_configs(CONFIGURATIONS)} >= {True, False}
    assert any(model.rope_scaling.factor > 1 for model in models if model.rope_scaling)


def test_from_transformers_through_training_and_back(oracle: str, tmp_path: Path) -> None:
    """Made there, loaded, matched, trained here for a few steps, exported, loaded there, matched again."""
    config = {
        "model_type": "deepseek_v3",
        "vocab_size": 320,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "first_k_dense_replace": 1,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "q_lora_rank": 12,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "max_position_embeddings": 128,
        "rope_scaling": {
            "type": "yarn",
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    }
    start, run, out = tmp_path / "start", tmp_path / "run", tmp_path / "out"
    run_transformers(oracle, [{"make": str(start), "config": config, "seed": 5}], tmp_path)
    check_logits(dsv3.load_hf(start), start)
    (tmp_path / "corpus").mkdir()
    for number in range(40):
        text = f"def f{number}(x):\n    return x + {number}\n" * 20
        (tmp_path / "corpus" / f"{number}.py").write_text(text)
    options = {
        "--init-from": start,
        "--out": run,
        "--steps": 3,
        "--data.corpus": tmp_path / "corpus",
        "--data.tokenizer": "byte",  # the folder has no tokenizer of its own
        "--data.sequence-length": 32,
        "--data.validation-sequences": 2,
        "--training.batch-size": 2,
        "--training.sample-tokens": 0,
        "--precision": "float32",
    }
    assert main(["train", *(str(word) for pair in options.items() for word in pair)]) == 0
    model, _, step = dsv3.load_checkpoint(run)
    assert step == 3
    before, after = dsv3.load_hf(start), model
    assert not np.allclose(before.head.weight[...], after.head.weight[...])
    assert main(["export-hf", str(run), str(out)]) == 0
    (problems,) = run_transformers(oracle, [{"check": str(out)}], tmp_path)
    assert problems["missing_keys"] == problems["mismatched_keys"] == []
    check_logits(model, out)
