"""`dsv3 import-hf` and `dsv3 export-hf`: the whole way round, and one line for whatever is wrong."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from interop.checkpoints import (
    GOLDEN,
    file_bytes,
    golden_config,
    golden_tensors,
    raw_tensors,
    write_checkpoint,
    write_index,
)

import dsv3_jax as dsv3
from dsv3_jax.cli.main import main
from dsv3_jax.data.tokenizer_training import byte_tokenizer, train_bpe
from dsv3_jax.interop.parameter_tree import arrays, with_arrays
from dsv3_jax.interop.tokenizer_files import read_tokenizer

NAME = "v3_negative_bias"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of one tiny bfloat16 model in three formats, with a tokenizer."""
    folder = tmp_path_factory.mktemp("published")
    config = dsv3.ModelConfig.preset("tiny")
    empty = nnx.eval_shape(lambda: dsv3.DeepSeekV3(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    drawn = {}
    for path, value in arrays(empty).items():
        numbers = jnp.asarray(0.1 * rng.standard_normal(value.shape, np.float32))
        drawn[path] = numbers if path.endswith("bias") else numbers.astype(jnp.bfloat16)
    (folder / "tokenizer.json").write_text(byte_tokenizer())
    for form in ("bfloat16", "float32", "fp8"):
        dsv3.save_hf(with_arrays(empty, drawn), folder / form, dtype=form, tokenizer=folder, max_shard_bytes=100_000)
    return folder


@pytest.mark.parametrize("form", ["bfloat16", "fp8"])
def test_import_then_export_gives_the_same_bytes(published: Path, tmp_path: Path, form: str) -> None:
    assert main(["import-hf", str(published / form), str(tmp_path / "run")]) == 0
    assert main(["export-hf", str(tmp_path / "run"), str(tmp_path / "out"), "--max-shard-gb", "0.0001"]) == 0
    assert raw_tensors(tmp_path / "out") == raw_tensors(published / form)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"):
        assert json.loads((tmp_path / "out" / name).read_text()) == json.loads((published / form / name).read_text())


def test_imported_run_is_a_run(published: Path, tmp_path: Path) -> None:
    assert main(["import-hf", str(published / "bfloat16"), str(tmp_path / "run")]) == 0
    model, tokenizer, step = dsv3.load_checkpoint(tmp_path / "run")
    assert step == 0
    assert tokenizer.decode(tokenizer.encode("def f():")) == "def f():"
    for path, value in arrays(dsv3.load_hf(published / "float32")).items():
        np.testing.assert_array_equal(arrays(model)[path], value)


CHAT = {
    "tokenizer_config.json": {
        "bos_token": "<｜begin▁of▁sentence｜>",
        "eos_token": "<｜User｜>",
        "pad_token": "<think>",
        "add_bos_token": True,
        "model_max_length": 4096,
        "chat_template": "{{ messages }}",
    },
    "generation_config.json": {"eos_token_id": [3, 1], "temperature": 0.6},
}


def test_what_lies_beside_the_weights_comes_out_again(published: Path, tmp_path: Path) -> None:
    """Through import and export, and through save_hf with the folder of the source."""
    source = shutil.copytree(published / "bfloat16", tmp_path / "source")
    for name, content in CHAT.items():
        (source / name).write_text(json.dumps(content))
    (source / "chat_template.jinja").write_text("{{ messages[0] }}")
    config = json.loads((source / "config.json").read_text()) | {"eos_token_id": 3, "pad_token_id": 5}
    (source / "config.json").write_text(json.dumps(config))
    assert main(["import-hf", str(source), str(tmp_path / "run")]) == 0
    assert main(["export-hf", str(tmp_path / "run"), str(tmp_path / "command")]) == 0
    dsv3.save_hf(dsv3.load_hf(source), tmp_path / "library", tokenizer=source)
    for target in (tmp_path / "command", tmp_path / "library"):
        assert {name: json.loads((target / name).read_text()) for name in CHAT} == CHAT
        assert (target / "chat_template.jinja").read_text() == "{{ messages[0] }}"
        assert (target / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
        values = json.loads((target / "config.json").read_text())
        assert [values[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [0, 3, 5]
        assert not (target / "model_tokens.json").exists()


@pytest.mark.parametrize("other", ["tiktoken.model", "tokenizer.model", None])
def test_without_a_tokenizer_json_nothing_is_made_up(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], other: str | None
) -> None:
    source = shutil.copytree(published / "bfloat16", tmp_path / "source")
    (source / "tokenizer.json").unlink()
    if other:
        (source / other).write_text("IQ== 0\n")
    assert main(["import-hf", str(source), str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "--tokenizer FILE" in error
    assert other is None or other in error
    assert not (tmp_path / "run").exists()
    assert main(["import-hf", str(source), str(tmp_path / "run"), "--tokenizer", "byte"]) == 0


def test_a_tokenizer_that_hardly_belongs_to_the_weights_is_said(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tokenizer.json").write_text(train_bpe(["some text of another language"], 280))
    words = ["import-hf", str(published / "bfloat16"), str(tmp_path / "run"), "--tokenizer", str(tmp_path)]
    assert main(words) == 0
    assert "is another tokenizer than the checkpoint's own" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="probably not the tokenizer of these weights"):
        read_tokenizer(tmp_path, 1000)


def test_an_imported_run_keeps_its_weights_only(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["import-hf", str(published / "bfloat16"), str(run)]) == 0
    model, _, _ = dsv3.load_checkpoint(run, dtype="bfloat16")
    for path, value in arrays(dsv3.load_hf(published / "bfloat16")).items():
        assert arrays(model)[path].dtype == value.dtype
        np.testing.assert_array_equal(arrays(model)[path], value)
    names = (run / "checkpoints/00000000/arrays/_METADATA").read_text()
    assert "params" in names
    assert "optimizer" not in names
    capsys.readouterr()
    assert main(["train", "--out", str(run), "--data.corpus", str(published)]) == 2
    assert f"--init-from {run}" in capsys.readouterr().err


def test_dry_run_needs_names_only(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("config.json", "model.safetensors.index.json"):
        shutil.copy(published / "fp8" / name, tmp_path)
    assert main(["import-hf", str(tmp_path), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert f"{len(raw_tensors(published / 'fp8')):,}  in all" in printed
    assert "weights are not here" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors.index.json"]


def broken(folder: Path, kind: str) -> Path:
    """A checkpoint with one thing wrong."""
    tensors: dict[str, Any] = golden_tensors(NAME)
    config: Any = golden_config(NAME)
    name = "model.layers.1.self_attn.o_proj.weight"
    if kind == "missing tensor":
        del tensors[name]
    elif kind == "extra tensor":
        tensors["surprise"] = tensors[name]
    elif kind == "absurd config":
        config["n_routed_experts"] = 2**60
    elif kind == "wrong shape":
        tensors[name] = ("F32", (24, 32), tensors[name][2])
    write_checkpoint(folder, tensors, config)
    model = folder / "model.safetensors"
    if kind == "cut":
        model.write_bytes(model.read_bytes()[:-1])
    elif kind == "long header":
        model.write_bytes(file_bytes({}, length=2**62))
    elif kind == "json bomb":
        (folder / "config.json").write_text("[" * 500_000)
    elif kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "traversal":
        write_index(folder, dict.fromkeys(tensors, "../model.safetensors"))
    elif kind == "link":
        model.rename(folder.parent / "outside.safetensors")
        model.symlink_to(folder.parent / "outside.safetensors")
    elif kind == "tokenizer":
        (folder / "tokenizer.json").write_text('{"model": 3}')
    elif kind == "pickle":
        model.unlink()
        (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    return folder


KINDS = {
    "missing tensor": "o_proj.weight' missing",
    "extra tensor": "'surprise' left over",
    "absurd config": "n_routed_experts",
    "wrong shape": "config.json makes it",
    "cut": "model.safetensors: tensor",
    "long header": "header of",
    "json bomb": "nested deeper",
    "no config": "config.json: is missing",
    "traversal": "a plain name",
    "link": "leads out",
    "tokenizer": "tokenizer.json",
    "no tokenizer": "--tokenizer",
    "pickle": "never opened",
}


@pytest.mark.parametrize("kind", KINDS)
def test_broken_source_is_one_line_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    source = broken(tmp_path / "source", kind)
    assert main(["import-hf", str(source), str(tmp_path / "runs" / "it")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert re.search(KINDS[kind], captured.err)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["import-hf"], "SRC"),
        (["import-hf", "{golden}"], "DST is missing"),
        (["import-hf", "{golden}", "{there}"], "is there already"),
        (["import-hf", "{none}", "{new}"], "no such folder"),
        (["import-hf", "{golden}", "{new}", "--fast"], "--fast"),
        (["import-hf", "{golden}", "{new}", "--tokenizer", "{none}"], "cannot read"),
        (["export-hf", "{none}", "{new}"], "holds no run"),
        (["export-hf", "{none}", "{there}"], "is there already"),
        (["export-hf", "{none}", "{new}", "--dtype", "int4"], "invalid choice"),
        (["export-hf", "{none}", "{new}", "--ue8m0"], "needs --dtype fp8"),
        (["export-hf", "{none}", "{new}", "--max-shard-gb", "0"], "from 1e-06 to 1000"),
        (["export-hf", "{none}", "{new}", "--max-shard-gb", "nan"], "from 1e-06 to 1000"),
    ],
)
def test_wrong_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    (tmp_path / "there").mkdir()
    places = {"golden": GOLDEN / NAME, "there": tmp_path / "there", "none": tmp_path / "none", "new": tmp_path / "new"}
    assert main([word.format(**places) for word in arguments]) == 2
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1
    assert words in captured.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("import-hf", "export-hf"):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        assert f"\n  dsv3 {command} " in capsys.readouterr().out


_FORBIDDEN = ("exec", "compile", "subprocess.Popen", "os.system", "socket.connect", "pickle.find_class", "os.exec")


def test_a_checkpoint_can_make_nothing_run(tmp_path: Path) -> None:
    """No code named by a file is imported, no process started, no other folder read from."""
    config = golden_config(NAME) | {"auto_map": {"AutoModel": "evil.Model"}}
    folder = write_checkpoint(tmp_path / "source", golden_tensors(NAME), config)
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")
    from dsv3_jax.interop.account import take_account
    from dsv3_jax.interop.checkpoint_folder import open_checkpoint
    from dsv3_jax.interop.hf_config import read_config

    seen: list[str] = []
    listening = [True]

    def listen(event: str, arguments: tuple[Any, ...]) -> None:
        if not listening[0]:
            return
        if event in _FORBIDDEN:
            seen.append(event)
        elif event == "open" and isinstance(arguments[0], str) and arguments[0].startswith(str(tmp_path)):
            seen.append(Path(arguments[0]).name)
        elif event == "import" and "evil" in str(arguments[0]):
            seen.append("import")

    sys.addaudithook(listen)
    try:
        checkpoint = open_checkpoint(folder)
        account = take_account(checkpoint, read_config(folder))
        for tensor in account.consumed:
            assert checkpoint.entries is not None
            checkpoint.entries[tensor.name].read()
    finally:
        listening[0] = False
    assert set(seen) == {"config.json", "model.safetensors"}
