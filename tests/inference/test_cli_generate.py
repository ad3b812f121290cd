"""Checks what `dsv3 generate` prints, and what it refuses."""

from __future__ import annotations

import json
import os
import sys
import unicodedata

import jax
import pytest
from small_models import small_model

from dsv3_jax.cli import generate as command
from dsv3_jax.cli.main import main
from dsv3_jax.cli.models import Loaded
from dsv3_jax.config import ModelConfig
from dsv3_jax.data import Tokenizer
from dsv3_jax.data.control_tokens import USER
from dsv3_jax.data.tokenizer_training import byte_tokenizer
from dsv3_jax.errors import UserError
from dsv3_jax.inference import GREEDY, Engine, EngineConfig, Sampler, complete
from dsv3_jax.model import DeepSeekV3


def bytes_alone() -> Tokenizer:
    """Returns a tokenizer without merges, which has one id per byte."""
    return Tokenizer(byte_tokenizer(), "the test's tokenizer")


@pytest.fixture(scope="module")
def run() -> tuple[DeepSeekV3, Tokenizer]:
    """Returns a run with a random model over bytes."""
    tokenizer = bytes_alone()
    config = ModelConfig.preset("tiny", vocab_size=tokenizer.vocab_size, initializer_range=0.2)
    return small_model(config, 1), tokenizer


@pytest.fixture
def loaded(run, monkeypatch: pytest.MonkeyPatch):
    """Makes the command load the random model instead of a run."""
    monkeypatch.setattr("dsv3_jax.cli.models.load_model", lambda folder, dtype, step, sets: Loaded(*run, "step 7"))
    return run


def expected(run, prompt: str, new: int, sampler: Sampler = GREEDY, seed: int = 0) -> str:
    model, tokenizer = run
    ids = tokenizer.encode(prompt) or [tokenizer.eos_id]
    written = complete(model, [ids], new, sampler, jax.random.key(seed), stop_token=tokenizer.eos_id)
    return prompt + tokenizer.decode(written[0]) + "\n"


def test_streamed_text_is_the_whole_text(loaded, capsys) -> None:
    assert main(["generate", "RUN", "--prompt", "def f(", "--max-new-tokens", "12", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == expected(loaded, "def f(", 12)


@pytest.mark.parametrize("words", [["--stream"], ["--no-stream"]])
def test_weights_are_kept_in_eight_bits_on_request(words: list[str], loaded, capsys, monkeypatch) -> None:
    kept = []

    def engine(model: DeepSeekV3, config: EngineConfig) -> Engine:
        kept.append(config.int8_weights)
        return Engine(model, config)

    # The package's attribute of that name is the function.
    monkeypatch.setattr(sys.modules["dsv3_jax.inference.generate"], "Engine", engine)
    for more in ([], ["--int8"]):
        assert main(["generate", "RUN", "--prompt", "def f(", "--max-new-tokens", "4", *words, *more]) == 0
        assert capsys.readouterr().out.startswith("def f(")
    assert kept == [False, True]


def test_a_batch_prints_each_prompt_with_its_text(loaded, capsys) -> None:
    words = "generate RUN --prompt def --prompt class --max-new-tokens 12 --temperature 0.8 --top-k 50 --seed 3"
    assert main(words.split()) == 0
    sampler = Sampler(temperature=0.8, top_k=50)
    first, second = (expected(loaded, prompt, 12, sampler, seed=3) for prompt in ("def", "class"))
    assert capsys.readouterr().out == f"--- 1 ---\n{first}\n--- 2 ---\n{second}"


def test_without_a_prompt_a_document_begins(loaded, capsys) -> None:
    assert main(["generate", "RUN", "--no-stream", "--max-new-tokens", "12", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == expected(loaded, "", 12)


def test_the_default_length_fits_the_context(loaded, capsys) -> None:
    prompt = "x" * (loaded[0].config.max_position_embeddings - 3)
    assert main(["generate", "RUN", "--prompt", prompt, "--temperature", "0"]) == 0
    assert capsys.readouterr().out == expected(loaded, prompt, 3)


def test_the_default_sampler_draws(loaded, capsys) -> None:
    assert main(["generate", "RUN", "--prompt", "def", "--max-new-tokens", "12"]) == 0
    assert capsys.readouterr().out == expected(loaded, "def", 12, Sampler(temperature=0.8, top_p=0.95))


def test_standard_input(loaded, capsys, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    for words in (["--prompt", "-"], []):
        (tmp_path / "prompt").write_text("né\n", encoding="utf-8")
        with (tmp_path / "prompt").open() as stream:
            monkeypatch.setattr("sys.stdin", stream)
            assert main(["generate", "RUN", *words, "--max-new-tokens", "12", "--temperature", "0"]) == 0
        assert capsys.readouterr().out == expected(loaded, "né", 12)


def test_a_prompt_from_a_file(loaded, capsys, tmp_path) -> None:
    (tmp_path / "prompt").write_text("né\n", encoding="utf-8")
    words = [
        "generate",
        "RUN",
        "--prompt-file",
        str(tmp_path / "prompt"),
        "--max-new-tokens",
        "12",
        "--temperature",
        "0",
    ]
    assert main(words) == 0
    assert capsys.readouterr().out == expected(loaded, "né", 12)
    assert main(["generate", "RUN", "--prompt-file", str(tmp_path / "absent")]) == 2
    assert "absent: No such file" in capsys.readouterr().err
    (tmp_path / "prompt").write_bytes(b"a\xff")
    assert main(words) == 2
    assert "prompt is not UTF-8 at byte 1" in capsys.readouterr().err


def test_an_open_pipe_without_text_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = (os.fdopen(end, mode) for end, mode in zip(os.pipe(), "rw", strict=True))
    with reading, writing:
        assert not command._is_given(reading)
        writing.write("a")
        writing.flush()
        assert command._is_given(reading)


def published(run, **files: dict) -> tuple[DeepSeekV3, Tokenizer, str]:
    """Returns the run with the settings of a published checkpoint."""
    companions = {f"{name}.json": json.dumps(content) for name, content in files.items()}
    return run[0], Tokenizer(byte_tokenizer(), companions=companions), "step 0"


def test_begin_turn_and_end_tokens_of_a_published_model(run, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    generation = {"temperature": 0.0, "do_sample": True, "eos_token_id": list(range(40))}
    it = published(run, tokenizer_config={"add_bos_token": True}, generation_config=generation)
    monkeypatch.setattr("dsv3_jax.cli.models.load_model", lambda folder, dtype, step, sets: Loaded(*it))
    ids = [it[1].bos_id, it[1].control_id(USER), *it[1].encode("pears")]
    (written,) = complete(it[0], [ids], 60, GREEDY, stop_token=range(40))
    assert len(written) < 60
    for stream in ("--stream", "--no-stream"):
        assert main(["generate", "RUN", "--prompt", USER + "pears", "--max-new-tokens", "60", stream]) == 0
        printed = capsys.readouterr()
        assert printed.out == USER + "pears" + it[1].decode(written) + "\n"
        assert printed.err == "dsv3: note: temperature 0, as the checkpoint's generation_config.json says\n"


def test_generated_control_characters_do_not_reach_a_terminal(loaded, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["generate", "RUN", "--prompt", "a\x1b[2Jb", "--max-new-tokens", "40", "--temperature", "0"]
    assert main(words) == 0
    assert "\x1b[2J" in capsys.readouterr().out  # a file gets the text as it is
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("a\\x1b[2Jb")
    assert not any(unicodedata.category(each) == "Cc" for each in printed.replace("\n", "").replace("\t", ""))


def test_characters_of_several_tokens_come_out_whole() -> None:
    tokenizer = bytes_alone()
    ids = tokenizer.encode("né 漢!")
    pieces = list(command._decoded(tokenizer, iter([*ids, tokenizer.eos_id, *ids])))
    assert "".join(pieces) == "né 漢!"
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)
    torn = list(command._decoded(tokenizer, iter(ids[:-2])))
    assert "".join(torn) == tokenizer.decode(ids[:-2])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["RUN", "--prompt", "y" * 129], "129 tokens .* context is 128"),
        (["RUN", "--prompt", "y" * 100, "--max-new-tokens", "40"], "at most 28 new tokens"),
        (["RUN", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["RUN", "--top-p", "2"], "top-p"),
        (["RUN", "--temperature", "warm"], "--temperature"),
        (["RUN", "--tmperature", "1"], "--tmperature"),
        (["RUN", "def main("], "given with --prompt"),
        (["RUN", "--dtype", "int8"], "--dtype"),
        ([], "run"),
    ],
)
def test_bad_input_is_one_line_and_code_two(loaded, capsys, words, message) -> None:
    with pytest.raises(UserError, match=message):
        command.main(words)
    assert main(["generate", *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1


def test_a_folder_without_a_run_is_named(tmp_path, capsys) -> None:
    assert main(["generate", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
