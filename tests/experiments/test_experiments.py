"""Checks the experiments: their corpora, finished arms that are read instead of run again, means and their spread."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import math
import random
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsv3_jax.post_training.rewards import numeric

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
TRAINING = ("fp8_vs_bf16", "mtp_ablation", "balance_ablation", "expert_specialisation", "long_context", "moe_vs_dense")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """Imports a script of `experiments/` with the import path that running it would have."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if (EXPERIMENTS / f"{name}.py").exists():
            del sys.modules[name]


def test_domains_are_unlike_and_always_the_same(load, tmp_path: Path):
    corpora = load("corpora")
    path = corpora.write_domains(tmp_path / "a.jsonl", documents=4)
    assert path.read_bytes() == corpora.write_domains(tmp_path / "b.jsonl", documents=4).read_bytes()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    texts = {domain: [row["text"] for row in rows if row["domain"] == domain] for domain in corpora.DOMAINS}
    assert [len(found) for found in texts.values()] == [4, 4, 4]
    share = {
        domain: sum(text.count(digit) for text in found for digit in "0123456789") / sum(map(len, found))
        for domain, found in texts.items()
    }
    assert share["mathematics"] > 5 * max(share["code"], share["prose"])


def positions_of_facts(text: str) -> dict[int, list[int]]:
    """Returns the position of each key's fact, a character with the code 33 + 8 key + value."""
    found: dict[int, list[int]] = {}
    for place, code in enumerate(text.encode()):
        if 33 <= code < 97:
            found.setdefault((code - 33) // 8, []).append(place)
    return found


def check_answers(text: str) -> int:
    """Checks that every question (105 + key) follows its fact and has its answer (97 + value); returns their number."""
    codes, facts = text.encode(), positions_of_facts(text)
    questions = [place for place, code in enumerate(codes[:-1]) if 105 <= code < 113]
    for place in questions:
        (at,) = facts[codes[place] - 105]
        assert at < place
        assert codes[place + 1] - 97 == (codes[at] - 33) % 8
    return len(questions)


def test_a_text_of_facts_fills_a_row_and_answers_its_questions(load, tmp_path: Path):
    path = load("corpora").write_retrieval(tmp_path / "facts.jsonl", documents=20, length=64)
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    assert {len(text) for text in texts} == {63}  # with the token for the end of the text
    assert all(check_answers(text) > 0 for text in texts)
    assert set().union(*map(positions_of_facts, texts)) == set(range(8))


@pytest.mark.parametrize("depth", [0.0, 0.3, 0.5, 1.0])
def test_a_haystack_asks_for_its_needle(load, depth: float):
    corpora = load("corpora")
    for seed in range(20):
        text = corpora.haystack(random.Random(seed), 128, depth)
        assert len(text) == 128
        assert check_answers(text) > 1
        (at,) = positions_of_facts(text)[corpora.NEEDLE]
        assert abs(at - depth * 125) <= 1.5  # rounded, and before a question rather than after it
        assert text.index(chr(105 + corpora.NEEDLE)) == 126


def test_spread_and_pairs(load):
    ablation = load("ablation")
    found = ablation.paired([2.0, 3.5, 4.0], [1.0, 2.0, 3.0])
    assert found["values"] == [1.0, 1.5, 1.0]
    assert math.isclose(found["standard_deviation"], statistics.stdev([1.0, 1.5, 1.0]))
    assert ablation.spread([2.0])["standard_deviation"] is None
    assert ablation.smoothed([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])


def test_a_finished_arm_is_read_not_run(load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ablation = load("ablation")
    options = ablation.Options("name", "tiny", (0,), tmp_path / "out", tmp_path / "runs", 2)
    config = ablation.run_of(options, 0, steps=9)
    assert config.training.steps == 2
    folder = tmp_path / "runs" / "arm-0"
    folder.mkdir()
    evaluation = {"main": {"loss": 1.5, "bits_per_byte": 2.0}, "mtp": [], "mtp_acceptance": []}
    (folder / "summary.json").write_text(json.dumps({"validation": evaluation}))
    record = {"step": 1, "main_loss": 2.0, "max_violation": 0.5}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n" + json.dumps(record | {"step": 2}) + "\n")
    monkeypatch.setattr(ablation, "train", lambda *_, **__: pytest.fail("it was run again"))
    result = ablation.run_arm(config, folder)
    assert result.steps == [1, 2]
    assert result.validation_loss == 1.5


@pytest.mark.parametrize("scale", ["tiny", "small", "1b"])
def test_dense_models_match_the_mixture(load, scale: str):
    script = load("moe_vs_dense")
    mixture, compute, memory = script.models_of(scale).values()
    _, data = script.mixture_and_data(scale)
    unit = 3 * mixture.hidden_size * mixture.num_hidden_layers  # parameters of a wider feed-forward network
    operations = [script.count_flops(model, data.sequence_length).forward for model in (mixture, compute)]
    assert abs(operations[0] - operations[1]) <= unit  # half a unit of width, two operations a parameter
    assert abs(mixture.num_parameters() - memory.num_parameters()) <= unit / 2
    for model in (compute, memory):
        assert model.num_parameters(mtp=True) == model.num_active_parameters()
        changed = {"first_k_dense_replace", "intermediate_size"}
        fields = model.to_dict().items()
        assert {name for name, value in fields if value != mixture.to_dict()[name]} == changed


def test_mixture_and_dense_are_compared_seed_by_seed(load, tmp_path: Path):
    script = load("moe_vs_dense")
    bits = {script.MOE: (2.0, 2.5), script.COMPUTE: (2.25, 2.75), script.MEMORY: (1.75, 2.75)}
    for name, values in bits.items():
        for seed, value in enumerate(values):
            folder = tmp_path / "runs" / f"{name.replace(' ', '_')}-{seed}"
            folder.mkdir(parents=True)
            (folder / "summary.json").write_text(json.dumps({"validation": {"main": {"bits_per_byte": value}}}))
            record = {"step": 1, "main_loss": value, "max_violation": 0.0}
            (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    script.main(["--seeds", "0", "1", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out" / "moe_vs_dense.json").read_text())
    assert found["arms"][script.COMPUTE]["more_than_mixture"]["values"] == [0.25, 0.25]
    assert found["arms"][script.MEMORY]["more_than_mixture"]["values"] == [-0.25, 0.25]
    assert "needs +0.2500 ± 0.0000 bits more" in found["verdict"]
    assert "+0.0000 ± 0.3536 (within the noise of the seeds)" in found["verdict"]
    assert (tmp_path / "out" / "moe_vs_dense.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", [*TRAINING, "memory"])
def test_an_unknown_scale_is_one_line(load, name: str, capsys: pytest.CaptureFixture[str]):
    refused(load(name).main, ["--scale", "galactic"], capsys, "--scale", "'galactic'", "choose from", "--help")


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        pytest.param(["--step", "3"], ["--step 3", "--help"], id="misspelt"),
        pytest.param(["--steps", "-3"], ["--steps", "'-3'", "at least 0"], id="negative"),
        pytest.param(["--steps", "many"], ["--steps", "'many'", "at least 0"], id="no-number"),
        pytest.param(["--seeds", "1", "1"], ["--seeds", "give each once"], id="seed-twice"),
        pytest.param(["--runs", f"{__file__}/below"], ["--runs", Path(__file__).name, "is a file"], id="file"),
    ],
)
def test_a_wrong_option_is_one_line(load, argv: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]):
    refused(lambda argv: load("ablation").parse_options("name", None, argv), argv, capsys, *parts)


@pytest.mark.parametrize(("name", "other"), [("fp8_vs_bf16", "float32"), ("balance_ablation", "none")])
def test_chosen_arms_run_beside_those_that_the_claim_compares(load, name: str, other: str):
    script, parse = load(name), load("ablation").parse_options
    arms = tuple(script.ARMS) if name == "fp8_vs_bf16" else tuple(script.arms_of(0.0))
    given = {"arms": arms, "compared": script.COMPARED}
    assert parse(name, None, [], **given).arms == arms
    chosen = parse(name, None, ["--arms", other], **given).arms
    assert set(chosen) == {*script.COMPARED, other}
    assert list(chosen) == sorted(chosen, key=arms.index)


def test_experiments_start_again_with_huge_pages_as_programs_only(load, monkeypatch: pytest.MonkeyPatch):
    started = []
    module = load("command_line")
    monkeypatch.setattr(module, "restart_with_huge_pages", lambda: started.append(True))
    monkeypatch.setattr(sys, "argv", ["experiment.py"])
    module.CommandLine("text").parse_args([])
    assert not started
    module.CommandLine("text").parse_args()
    assert started


def test_an_impossible_schedule_is_one_line(load, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    argv = ["--ranks", "3", "--output", str(tmp_path / "out")]
    refused(load("pipeline_schedules").main, argv, capsys, "3", "use 2 or 4")
    assert not (tmp_path / "out").exists()


def refused(main: Callable[[list[str]], Any], argv: list[str], capsys: pytest.CaptureFixture[str], *parts: str):
    """Checks that a call ends with exit code 2 and one line that contains everything in `parts`."""
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert all(part in printed.err for part in parts), printed.err


def test_calculated_memory_is_what_arrays_hold(load, tmp_path: Path):
    memory = load("memory")
    size = dataclasses.replace(memory.SIZES["tiny"], counts_step=False)
    tables = memory.tables_of(size)
    assert tables["cache calculated"] == tables["cache measured"]
    assert tables["cache calculated"]["MLA"] == 2 * (size.model.kv_lora_rank + size.model.qk_rope_head_dim)
    v3 = memory.cache_calculated(memory.SIZES["v3"].model, {"MHA": 128})
    assert v3 == {"MLA": 2 * 576, "MHA": 2 * 128 * 320}
    # At the width of `tiny` the rows that fill FP8's tiles up to 128 outweigh what FP8 saves.
    bfloat16, fp8 = (memory.step_saved(memory.SIZES["small"], name, "report") for name in ("bfloat16", "fp8"))
    assert fp8 < bfloat16


@pytest.mark.parametrize("path", sorted((EXPERIMENTS / "results").glob("*/*.json")), ids=lambda path: path.stem)
def test_committed_results_say_where_they_come_from(path: Path):
    found = json.loads(path.read_text())
    if "experiment" not in found:
        pytest.skip("the results of a run or a plan have their own form")
    assert {"verdict", "scale", "seeds", "device", "versions"} <= found.keys()
    script = EXPERIMENTS / f"{found['experiment']}.py"
    assert script.exists()
    assert "main" in {node.name for node in ast.parse(script.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_worked_answers_are_right_and_quick_ones_are_not(load):
    script = load("r1_zero_small")
    problems = script.generate_problems("arithmetic", "train", 1, script.SIZE)
    some = [next(problems) for _ in range(300)]
    right = 0
    for problem in some:
        answer = script.worked_answer(problem)
        *_, last = answer.removesuffix(f". \\boxed{{{problem.answer}}}").split(", ")
        assert answer.endswith(f"= {problem.answer}. \\boxed{{{problem.answer}}}")
        calculation, _, result = last.partition(" = ")
        assert eval(calculation) == int(result)  # noqa: S307
        assert numeric(problem.prompt, answer, problem.answer) == 1
        right += numeric(problem.prompt, script.quick_answer(problem), problem.answer)
    assert right < 0.1 * len(some)
