"""Checks `dsv3 serve` and `dsv3 chat` as a user meets them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from small_models import small_model
from small_server import TOKENIZER

from dsv3_jax.cli import chat as chat_command
from dsv3_jax.cli.main import main
from dsv3_jax.cli.models import Loaded
from dsv3_jax.config import ModelConfig
from dsv3_jax.data import ChatTemplate, plain_template
from dsv3_jax.inference import GREEDY, Engine, EngineConfig, Request, Result
from dsv3_jax.interop import save_hf

CONFIG = ModelConfig.preset("tiny", vocab_size=TOKENIZER.vocab_size, num_hidden_layers=2, initializer_range=0.25)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a published checkpoint of a chat model."""
    folder = tmp_path_factory.mktemp("models") / "little"
    tokenizer = TOKENIZER.with_chat_template(plain_template(TOKENIZER))
    save_hf(small_model(CONFIG, 3), folder, tokenizer=tokenizer)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_serve_a_published_checkpoint_until_sigterm(published: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret\n")
    words = ["serve", str(published), "--port", "0", "--max-sequences", "1", "--drafts", "0", "--no-experts", "--int8"]
    words += ["--api-key-file", str(tmp_path / "key"), "--context", "64"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dsv3_jax.cli.main", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith(f"serving little (the published checkpoint {published}) on http://127.0.0.1:"), line
        client = httpx.Client(base_url=line.split()[-1], headers={"authorization": "Bearer secret"}, timeout=60)
        body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 50, "stream": True}
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        client.close()
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert errors.splitlines()[-1] == "stopped"
    assert "compiling 1 of " in errors
    assert "Traceback" not in errors


def test_a_port_in_use_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(tmp_path), "--port", str(port)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"dsv3: cannot listen on port {port} of 127.0.0.1: Address already in use; give another")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["RUN", "--port", "70000"], "--port"),
        (["RUN", "--port", "0", "--host", "192.0.2.1"], "cannot listen on"),
        (["RUN", "--port", "0", "--host", "no such host"], "give an address of this machine"),
        (["RUN", "--max-sequences", "0"], "--max-sequences"),
        (["RUN", "--api-key-file", "absent"], "absent"),
        (["RUN", "--api-key-file", "EMPTY"], "must hold a key"),
        (["RUN", "--prot", "1"], "--prot"),
        (["RUN", "--port", "0"], "RUN"),
        ([], "run"),
    ],
)
def test_bad_input_of_serve(words, message, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "RUN").mkdir()
    (tmp_path / "EMPTY").write_text("two words")
    assert main(["serve", *words]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert (printed.out, len(printed.err.splitlines())) == ("", 1)


def test_serve_needs_its_extra(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["serve", str(tmp_path)]) == 2
    assert "pip install 'dsv3-jax[serve]'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def models() -> tuple[Loaded, Loaded]:
    """Returns a base model and a chat model, with the same weights."""
    model = small_model(CONFIG, 3)
    return (
        Loaded(model, TOKENIZER, "step 7"),
        Loaded(model, TOKENIZER.with_chat_template(plain_template(TOKENIZER)), "step 7"),
    )


def written(model, prompt: list[int], new: int) -> Result:
    """Returns the model's greedy text."""
    engine = Engine(model, EngineConfig(max_sequences=1, compile_at_start=False), to_bytes=TOKENIZER.to_bytes)
    request = Request(prompt=tuple(prompt), max_new_tokens=new, sampler=GREEDY, stop_tokens=TOKENIZER.end_ids)
    return engine.run([request])[0]


def talk(monkeypatch, capsys, loaded: Loaded, lines: list[str], *words: str, max_new: str = "9") -> str:
    """Returns what the command prints when a user types lines."""
    typed = iter(lines)

    def read(prompt: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr("dsv3_jax.cli.models.load_model", lambda folder, dtype: loaded)
    assert main(["chat", "RUN", "--max-new-tokens", max_new, "--temperature", "0", *words]) == 0
    return capsys.readouterr().out


@pytest.mark.slow
def test_chat_keeps_the_conversation(models, monkeypatch, capsys) -> None:
    _, loaded = models
    template = ChatTemplate.of(loaded.tokenizer)
    assert template is not None
    system = {"role": "system", "content": "S"}
    first = written(loaded.model, template.prompt([system, {"role": "user", "content": "a"}]), 9).text
    messages = [system, {"role": "user", "content": "a"}, {"role": "assistant", "content": first}]
    second = written(loaded.model, template.prompt([*messages, {"role": "user", "content": "b"}]), 9).text
    printed = talk(monkeypatch, capsys, loaded, ["a", "b", "/new", "a", "/quit", "never"], "--system", "S")
    shown = [chat_command.printable(text) for text in (first, second, "A new chat.", first)]
    assert printed.partition("ends.\n")[2] == "\n".join(shown) + "\n"


@pytest.mark.slow
def test_a_base_model_goes_on_with_the_text(models, monkeypatch, capsys) -> None:
    loaded, _ = models
    first = written(loaded.model, TOKENIZER.encode("/a"), 9)
    second = written(loaded.model, [*TOKENIZER.encode("/a"), *first.tokens, *TOKENIZER.encode("b")], 9)
    printed = talk(monkeypatch, capsys, loaded, ["/a", "b"])
    assert "base model without a chat template: it goes on with your text.\n" in printed
    shown = [chat_command.printable(each.text) for each in (first, second)]
    assert printed.partition("your text.\n")[2] == "\n".join(shown) + "\n\n"


@pytest.mark.parametrize("words", [(), ("--int8",)])
def test_weights_are_in_eight_bits_on_request(words, models, monkeypatch, capsys) -> None:
    """The engine is given the choice; the text is then that of such an engine."""
    loaded, _ = models
    made = []

    class Recorded(Engine):
        def __init__(self, model, config, **others):
            made.append(config.int8_weights)
            super().__init__(model, config, **others)

    monkeypatch.setattr("dsv3_jax.inference.Engine", Recorded)
    printed = talk(monkeypatch, capsys, loaded, ["a"], *words, max_new="3")
    assert made == [bool(words)]
    assert printed.partition("your text.\n")[2].strip()


def test_commands_of_the_chat(models, monkeypatch, capsys) -> None:
    _, loaded = models
    lines = [
        "/nwe",
        "/set temperature -1",
        "/set heat 1",
        "/set top-p 0.5",
        "/set system Be brief.",
        "/settings",
        "/help",
    ]
    printed = talk(monkeypatch, capsys, loaded, [*lines, "x" * 200])
    for line in (
        "there is no command /nwe; did you mean /new?",
        "temperature must be a number from 0 to 1000000.0, not '-1'",
        "there is no setting 'heat'",
        "top-p          0.5",
        "system         Be brief.",
        "Ctrl-C stops an answer",
        "but the model's context is 128; begin a new one with /new",
    ):
        assert line in printed


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_alone(models, monkeypatch, capsys) -> None:
    _, loaded = models
    step = Engine.step
    pressed = iter([True])

    def interrupted(self):
        if next(pressed, False):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        return step(self)

    monkeypatch.setattr(Engine, "step", interrupted)
    printed = talk(monkeypatch, capsys, loaded, ["a", "a"], max_new="90")
    assert printed.count("[stopped]") == 1
    assert len(printed) > 90


def test_ctrl_c_at_the_prompt_ends(models, monkeypatch, capsys) -> None:
    _, loaded = models
    monkeypatch.setattr("dsv3_jax.cli.models.load_model", lambda folder, dtype: loaded)

    def press(prompt: str) -> str:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        return "not reached"

    monkeypatch.setattr("builtins.input", press)
    handler = signal.getsignal(signal.SIGINT)
    assert main(["chat", "RUN"]) == 0
    assert signal.getsignal(signal.SIGINT) is handler
    assert threading.active_count() < 20


def test_the_checkpoint_of_a_run_that_still_trains_is_named(tmp_path, monkeypatch) -> None:
    from dsv3_jax.runs.folder import RunFolder

    folder = RunFolder(tmp_path)
    assert not folder.is_in_training()
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder.lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    assert folder.is_in_training()
    process.communicate(b"\n", timeout=20)
    assert not folder.is_in_training()
