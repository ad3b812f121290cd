"""The compiler's word on a plan: a small step compiled for absent GPUs and TPUs, and collectives read from HLO."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import UserError
from dsv3_jax.planning import compile_ahead
from dsv3_jax.planning.collectives import read_collectives
from dsv3_jax.planning.compiled import CompiledPlan, compile_plan
from dsv3_jax.planning.config import PlanConfig
from dsv3_jax.planning.hardware import Target
from dsv3_jax.planning.plan import RESERVED, make_plan
from dsv3_jax.sharding.mesh import MeshConfig

MODEL = ModelConfig.preset(
    "tiny",
    vocab_size=512,
    hidden_size=256,
    num_hidden_layers=1,
    first_k_dense_replace=0,
    moe_intermediate_size=128,
    num_nextn_predict_layers=0,
    # Widths of whole tiles, on a TPU too.
    num_attention_heads=4,
    q_lora_rank=128,
    kv_lora_rank=128,
    qk_nope_head_dim=96,
    qk_rope_head_dim=32,
    v_head_dim=128,
)

HLO = """HloModule step, entry_computation_layout={()->f32[]}

%condition (c: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  %c = (s32[], f32[8]) parameter(0)
  %at = s32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%at, %limit), direction=LT
}

%inner (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %gathered = bf16[4,128]{1,0} all-gather(%x), replica_groups=[4,2]<=[8], dimensions={0}
  %sent = (bf16[2,64], bf16[16,64], /*index=2*/s64[2]) ragged-all-to-all(%a), replica_groups={{0,1,2,3},{4,5,6,7}}
  %back = bf16[2,64]{1,0} ragged-all-to-all(%b), replica_groups={{0,1,2,3},{4,5,6,7}}
  %rows = f8e4m3fn[2,64]{1,0} fusion(%c), kind=kLoop
  %there = f8e4m3fn[16,64]{1,0} ragged-all-to-all(%rows, %room, %starts), replica_groups={{0,1,2,3},{4,5,6,7}}
}

%outer (q: (s32[], f32[8])) -> (s32[], f32[8]) {
  %w = (s32[], f32[8]) while(%q), condition=%condition, body=%inner
}

ENTRY %main () -> f32[] {
  %loop = (s32[], f32[8]) while(%t), condition=%other, body=%outer, backend_config={"known_trip_count":{"n":"3"}}
  %sum = f32[256]{0} all-reduce(%y), replica_groups=mesh['fsdp'=2,'expert'=4] {'fsdp','expert':(1)2}, to_apply=%add
  %begun = ((f32[8], f32[4]), (f32[32], f32[16])) all-gather-start(%z, %u), replica_groups={{0,1,2,3}}, dimensions={0}
  %scattered = f32[16]{0} reduce-scatter(%v), replica_groups={{0,1}}, to_apply=%add
  ROOT %alone = f32[] all-reduce(%v), replica_groups={{0},{1}}, to_apply=%add
}
"""


def test_collectives_are_counted_through_loops() -> None:
    found = {(item.kind, item.group): item for item in read_collectives(HLO)}
    assert {key: item.runs for key, item in found.items()} == {
        ("all-gather", 2): 15,  # 3 x 5, the inner count from the loop's condition
        ("ragged-all-to-all", 4): 45,
        ("all-reduce", 4): 1,
        ("all-gather", 4): 1,
        ("reduce-scatter", 2): 1,
    }
    assert found["all-gather", 2].sent == 15 * 4 * 128 * 2 / 2
    assert found["ragged-all-to-all", 4].sent == (30 * 2 + 15) * 2 * 64 * 3 / 4  # not the larger room
    assert found["all-reduce", 4].sent == 2 * 256 * 4 * 3 / 4
    assert found["all-gather", 4].sent == (32 + 16) * 4 * 3 / 4
    assert found["reduce-scatter", 2].sent == 16 * 4


def test_a_request_comes_back_equal() -> None:
    for target in ("h200:2048", "v5p:16x16x8"):
        config = PlanConfig(
            model=ModelConfig.preset("v3-671b"), target=Target.parse(target), mesh=MeshConfig(fsdp=32, expert=64)
        )
        assert PlanConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def compiled_or_skip(config: PlanConfig) -> CompiledPlan:
    """Skips where the compilers for the target are not installed."""
    try:
        return compile_plan(config)
    except UserError as error:
        if "setup-aot" in str(error) or "ptxas" in str(error):
            pytest.skip(str(error))
        raise


def test_a_refusal_is_the_compilers_own_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the last line of a traceback, which JAX ends with a remark about hidden frames."""

    def refuse(config: PlanConfig) -> None:
        raise RuntimeError(
            "RESOURCE_EXHAUSTED: out of memory allocating 96 GiB; 80 GiB available.\n\nLargest:\n  all-gather"
        )

    monkeypatch.setattr(compile_ahead, "compile_step", refuse)
    monkeypatch.setattr(compile_ahead.topology, "prepare", lambda target: None)
    monkeypatch.setattr(compile_ahead.topology, "why_unavailable", lambda target: None)
    config = PlanConfig(model=MODEL, target=Target.parse("h200:8"), mesh=MeshConfig(fsdp=8), sequence_length=128)
    assert compile_ahead.answer(config) == {
        "error": "the compiler refuses this step: RuntimeError: RESOURCE_EXHAUSTED: out of memory allocating 96 GiB; "
        "80 GiB available."
    }


@pytest.mark.parametrize(("code", "said"), [(-9, "by signal 9"), (1, "exit code 1")])
def test_a_process_that_dies_is_said(monkeypatch: pytest.MonkeyPatch, code: int, said: str) -> None:
    folders = []

    def run(command: list[str], **settings: Any) -> subprocess.CompletedProcess[str]:
        folders.append(settings["env"]["TMPDIR"])
        assert os.path.isdir(folders[0])
        return subprocess.CompletedProcess(command, code, "warming up\n", "loading\nkilled\n")

    monkeypatch.setattr(subprocess, "run", run)
    config = PlanConfig(model=MODEL, target=Target.parse("h200:8"), mesh=MeshConfig(fsdp=8), sequence_length=128)
    with pytest.raises(UserError, match=f"{said}.*killed"):
        compile_plan(config)
    assert not os.path.exists(folders[0])


@pytest.mark.aot
def test_the_compiler_agrees_with_the_paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments nearly exactly (the step has a few numbers more), the peak to a factor, tokens' exchange by count."""
    config = PlanConfig(
        model=MODEL,
        target=Target.parse("h200:8"),
        mesh=MeshConfig(fsdp=2, expert=4),
        sequence_length=128,
        micro_batch_size=16,
        average="none",
    )
    # Other tests compile at the same time, and leave files in the common folder meanwhile.
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    compiled = compiled_or_skip(config)
    assert not os.listdir(tmp_path)
    plan = make_plan(config)
    assert compiled.argument_bytes == pytest.approx(plan.state.masters + plan.state.moments, rel=0.02)
    assert 0.4 < compiled.peak_bytes / (plan.memory - RESERVED) < 2
    exchange = next(item for item in compiled.collectives if item.kind == "ragged-all-to-all")
    # Dispatch: rows, and beside them experts and gates, forward and recomputed; gradients of results. Combine: results,
    # and the gradients of rows and of gates. Each is sent in eight pieces; a ninth time there is no row to send.
    # The compiler counts whole buffers, which have rows for half more than an even load.
    assert (exchange.group, exchange.runs) == (4, 8 * 9)
    assert exchange.sent == pytest.approx(
        9 / 8 * 3 / 2 * next(flow.sent for flow in plan.flows if "experts" in flow.what)
    )
    assert exchange.hidden is not None
    assert exchange.hidden > 0.5


@pytest.mark.aot
def test_a_pipeline_compiles_for_absent_devices() -> None:
    """Arguments nearly exactly; weights and gradients change places once, hidden states in every tick."""
    config = PlanConfig(
        model=MODEL.replace(num_hidden_layers=2),
        target=Target.parse("v5p:2x2x1"),
        mesh=MeshConfig(stage=2, expert=2),
        sequence_length=128,
        schedule="1f1b",
        average="none",
    )
    compiled = compiled_or_skip(config)
    plan = make_plan(config)
    assert compiled.argument_bytes == pytest.approx(plan.state.masters + plan.state.moments, rel=0.02)
    assert 0.4 < compiled.peak_bytes / (plan.memory - RESERVED) < 2
    ticks = 2 * config.passes + 2 * (config.mesh.stage - 1)  # a forward or a backward pass each
    handed_on = next(item for item in compiled.collectives if item.kind == "collective-permute")
    assert handed_on.runs == 2 * ticks  # hidden states up, gradients down
