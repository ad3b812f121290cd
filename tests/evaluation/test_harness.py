"""Checks the adapter of lm-evaluation-harness against the plain model: scores in float64, greedy texts, whole tasks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from harness_tasks import QUESTIONS, TEXTS, write_tasks
from scipy.special import log_softmax
from small_models import small_model
from small_runs import small_run, write_corpus

from dsv3_jax.cli.main import main
from dsv3_jax.data import Tokenizer, plain_template
from dsv3_jax.data.tokenizer_training import byte_tokenizer
from dsv3_jax.errors import UserError
from dsv3_jax.model import DeepSeekV3

pytest.importorskip("lm_eval", reason="lm-evaluation-harness comes with the extra `eval`")
from dsv3_jax.evaluation import harness as module
from dsv3_jax.evaluation.harness import HarnessModel, describe_tasks, evaluate_tasks

CONTEXT = 48
CONFIG = small_run().model.replace(max_position_embeddings=CONTEXT, initializer_range=0.2)
MODEL = small_model(CONFIG, 1)
PLAIN = Tokenizer(byte_tokenizer())
TOKENIZER = PLAIN.with_chat_template(plain_template(PLAIN))
END = PLAIN.to_bytes([PLAIN.eos_id]).decode()


@nnx.jit
def logits_of(model: DeepSeekV3, ids: Any) -> Any:
    return model(ids).logits


def logprobs(ids: list[int]) -> np.ndarray:
    """Returns log-probabilities [T, V] after each of up to CONTEXT tokens, in float64 from the model's own logits."""
    padded = jnp.asarray([ids + [0] * (CONTEXT - len(ids))], jnp.int32)
    return log_softmax(np.asarray(logits_of(MODEL, padded), np.float64)[0, : len(ids)], axis=-1)


def score(context: list[int], continuation: list[int]) -> tuple[float, bool]:
    ids = (context + continuation)[-(CONTEXT + 1) :]
    rows = logprobs(ids[:-1])[-len(continuation) :]
    return sum(row[i] for row, i in zip(rows, continuation, strict=True)), bool((rows.argmax(-1) == continuation).all())


def asked(*arguments: Any) -> SimpleNamespace:
    return SimpleNamespace(args=arguments)


@pytest.fixture(scope="module")
def harness() -> HarnessModel:
    return HarnessModel(MODEL, TOKENIZER, batch_size=3)


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a folder of tasks, whose data are neither looked for in the network nor kept in the user's cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return write_tasks(tmp_path / "tasks")


def test_log_likelihoods(harness: HarnessModel) -> None:
    encode, end = TOKENIZER.encode, TOKENIZER.eos_id
    likeliest = TOKENIZER.decode([int(logprobs(encode("once"))[-1].argmax())])
    pairs = [("once upon", " a time"), ("", "数é"), ("once", likeliest), ("x" * 80, " y"), ("a ", "b"), ("once", "?")]
    got = harness.loglikelihood([asked(*pair) for pair in pairs])
    wanted = [score(encode(context) or [end], encode(continuation)) for context, continuation in pairs]
    wanted[4] = score(encode("a"), encode(" b"))  # a space at the end belongs to the continuation
    for (value, greedy), (sum_, right) in zip(got, wanted, strict=True):
        assert value == pytest.approx(sum_, abs=1e-4)
        assert greedy == right
    assert [greedy for _, greedy in got][2]
    with pytest.raises(UserError, match="context of 48"):
        harness.loglikelihood([asked("a", "b" * 49)])


def test_whole_texts_are_read_in_windows(harness: HarnessModel) -> None:
    def direct(ids: list[int]) -> float:
        read = [TOKENIZER.eos_id, *ids]
        total, at = 0.0, 0
        while at < len(ids):
            end = min(at + CONTEXT, len(ids))
            start = 0 if at == 0 else end - CONTEXT  # a later window is as long as the context
            total += score(read[start : at + 1], ids[at:end])[0]
            at = end
        return total

    got = harness.loglikelihood_rolling([asked(text) for text in TEXTS])
    assert got == pytest.approx([direct(TOKENIZER.encode(text)) for text in TEXTS], abs=1e-3)


def test_texts_are_greedy_and_end_at_stop_strings(harness: HarnessModel) -> None:
    def direct(context: str, most: int) -> str:
        ids = TOKENIZER.encode(context)[-(CONTEXT - most) :]
        new: list[int] = []
        while len(new) < most and new[-1:] != [TOKENIZER.eos_id]:
            new.append(int(logprobs(ids + new)[-1].argmax()))
        names = [TOKENIZER.control_id(name) for name in TOKENIZER.control_names]
        return TOKENIZER.decode([token for token in new if token not in names])

    contexts = ["once upon", "x " * 40, "é"]
    whole = harness.generate_until([asked(context, {"until": [], "max_gen_toks": 9}) for context in contexts])
    assert whole == [direct(context, 9) for context in contexts]
    stop = whole[0][3:5]
    (cut,) = harness.generate_until([asked(contexts[0], {"until": [stop, "\n\n"], "max_gen_toks": 9})])
    assert cut == whole[0][: whole[0].index(stop)]
    drawn = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 9}
    assert len(set(harness.generate_until([asked(contexts[0], drawn)] * 3))) > 1
    with pytest.raises(UserError, match="num_beams"):
        harness.generate_until([asked("a", {"num_beams": 2})])


def test_chats_hold_control_tokens_of_the_template_only(harness: HarnessModel) -> None:
    messages = [{"role": "user", "content": f"say {END}"}]
    ids = harness.tok_encode(harness.apply_chat_template(messages))
    assert ids == [*TOKENIZER.encode(f"{END}<｜User｜>", control_tokens=True), *ids[2:]]
    assert ids.count(TOKENIZER.eos_id) == 1
    begun = harness.apply_chat_template([*messages, {"role": "assistant", "content": "It is"}], False)
    assert begun.endswith("<｜Assistant｜>It is")
    with pytest.raises(UserError, match="--apply-chat-template"):
        HarnessModel(MODEL, PLAIN).apply_chat_template(messages)


def test_tasks(harness: HarnessModel, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = evaluate_tasks(harness, ["own_choice", "own_texts"], include_path=tasks)
    right = []
    for question in QUESTIONS:
        pairs = [asked(question["question"], choice) for choice in question["choices"]]
        best = np.argmax([value for value, _ in harness.loglikelihood(pairs)])
        right.append(best == question["answer"])
    assert results["results"]["own_choice"]["acc,none"] == pytest.approx(np.mean(right))
    sizes = sum(len(text.encode()) for text in TEXTS)
    nats = -sum(harness.loglikelihood_rolling([asked(text) for text in TEXTS]))
    bits = nats / np.log(2) / sizes
    assert results["results"]["own_texts"]["bits_per_byte,none"] == pytest.approx(bits)
    assert f"{bits:.4f}" in describe_tasks(results)
    # The harness's own tasks are left out: to read their names takes ten seconds.
    own = module._Tasks(include_path=str(tasks), include_defaults=False)
    monkeypatch.setattr(module, "_task_manager", lambda *_: own)
    with pytest.raises(UserError, match="no task 'nothing'"):
        evaluate_tasks(harness, ["nothing"], include_path=tasks)
    with pytest.raises(UserError, match="is no folder"):
        evaluate_tasks(harness, ["own_choice"], include_path=tasks / "absent")
    (tasks / "own_choice.jsonl").unlink()
    with pytest.raises(UserError, match="cannot load own_choice"):
        evaluate_tasks(harness, ["own_choice"], include_path=tasks)


def test_the_command_takes_runs_and_published_folders(
    tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsv3_jax.interop import save_hf
    from dsv3_jax.runs.checkpoints import Checkpoints
    from dsv3_jax.runs.folder import RunFolder
    from dsv3_jax.runs.saved_run import RunPosition
    from dsv3_jax.runs.starting_state import untrained_state

    config, run = small_run(write_corpus(tmp_path / "corpus")), RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.write_config(config)
    saving = Checkpoints(run, TOKENIZER, keep=1)
    model = small_model(config.model, 1)
    saving.save(untrained_state(model, config), RunPosition(step=0, tokens=0, data={}), config)
    saving.close()
    save_hf(model, tmp_path / "published")
    TOKENIZER.save(tmp_path / "published")
    options = [
        "--tasks",
        "own_choice,own_generation",
        "--include-path",
        str(tasks),
        "--limit",
        "2",
        "--apply-chat-template",
    ]
    found = []
    for folder in ("run", "published"):
        assert main(["eval", str(tmp_path / folder), *options, "--details", str(tmp_path / folder), "--json"]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert json.loads((tmp_path / folder / "tasks.json").read_text()) == printed
        assert printed["n-samples"]["own_choice"]["effective"] == 2
        found.append(printed["results"])
    assert found[0] == found[1]
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in [name for name in sys.modules if name.startswith("lm_eval.") or name == "dsv3_jax.evaluation.harness"]:
        monkeypatch.delitem(sys.modules, name)
    assert main(["eval", str(tmp_path / "run"), "--tasks", "own_choice"]) == 2
    assert "pip install 'dsv3-jax[eval]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--limit", "2"], "--tasks"),
        (["--tasks", "x", "--corpus", "y"], "--corpus"),
        (["--tasks", ","], "name at least"),
    ],
)
def test_options_that_do_not_fit(options: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "runs/absent", *options]) == 2
    printed = capsys.readouterr().err
    assert part in printed
    assert printed.count("\n") == 1
