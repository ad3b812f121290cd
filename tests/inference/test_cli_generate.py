"""Checks what `dsv3 generate` prints, and what it refuses."""

from __future__ import annotations

import jax
import pytest
from small_models import small_model

from dsv3_jax.cli import generate as command
from dsv3_jax.cli.main import main
from dsv3_jax.config import ModelConfig
from dsv3_jax.data import Tokenizer
from dsv3_jax.data.tokenizer_training import byte_tokenizer
from dsv3_jax.errors import UserError
from dsv3_jax.inference import Sampler, complete
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
    monkeypatch.setattr("dsv3_jax.runs.checkpoints.load_checkpoint", lambda folder: (*run, 7))
    return run


def expected(run, prompt: str, new: int, sampler: Sampler | None = None, seed: int = 0) -> str:
    model, tokenizer = run
    ids = tokenizer.encode(prompt) or [tokenizer.eos_id]
    written = complete(model, [ids], new, sampler, jax.random.key(seed), stop_token=tokenizer.eos_id)
    return prompt + tokenizer.decode(written[0]) + "\n"


def test_streamed_text_is_the_whole_text(loaded, capsys) -> None:
    assert main(["generate", "RUN", "--prompt", "def f(", "--max-new-tokens", "12"]) == 0
    assert capsys.readouterr().out == expected(loaded, "def f(", 12)


def test_a_batch_prints_each_prompt_with_its_text(loaded, capsys) -> None:
    words = "generate RUN --prompt def --prompt class --max-new-tokens 12 --temperature 0.8 --top-k 50 --seed 3"
    assert main(words.split()) == 0
    sampler = Sampler(temperature=0.8, top_k=50)
    first, second = (expected(loaded, prompt, 12, sampler, seed=3) for prompt in ("def", "class"))
    assert capsys.readouterr().out == f"--- 1 ---\n{first}\n--- 2 ---\n{second}"


def test_without_a_prompt_a_document_begins(loaded, capsys) -> None:
    assert main(["generate", "RUN", "--no-stream", "--max-new-tokens", "12"]) == 0
    assert capsys.readouterr().out == expected(loaded, "", 12)


def test_the_default_length_fits_the_context(loaded, capsys) -> None:
    prompt = "x" * (loaded[0].config.max_position_embeddings - 3)
    assert main(["generate", "RUN", "--prompt", prompt]) == 0
    assert capsys.readouterr().out == expected(loaded, prompt, 3)


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
        (["RUN", "--top-p", "2"], "top_p"),
        (["RUN", "--temperature", "warm"], "--temperature"),
        (["RUN", "--tmperature", "1"], "--tmperature"),
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
