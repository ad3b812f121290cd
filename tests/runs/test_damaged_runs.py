"""Checks that no damaged checkpoint is used, no good one is lost, and nothing beside the checkpoint is believed."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from small_runs import final_state

from dsv3_jax.data import Tokenizer
from dsv3_jax.data.tokenizer_training import byte_tokenizer, train_bpe
from dsv3_jax.errors import UserError
from dsv3_jax.runs.checkpoints import Checkpoints, load_run
from dsv3_jax.runs.evaluation import load_run_with_data
from dsv3_jax.runs.folder import RunFolder
from dsv3_jax.runs.loop import train
from dsv3_jax.runs.manifest import write_manifest
from dsv3_jax.runs.saved_run import DamagedCheckpoint, SavedRun, list_checkpoints, use_newest
from dsv3_jax.training.config import RunConfig

pytestmark = pytest.mark.slow

NESTED = "[" * 100_000 + "]" * 100_000


def replace(name: str, content: str) -> Callable[[Path], None]:
    """Returns a function that replaces a file of a checkpoint and makes the manifest again."""

    def harm(checkpoint: Path) -> None:
        (checkpoint / name).write_text(content)
        write_manifest(checkpoint)

    return harm


def remove(name: str) -> Callable[[Path], None]:
    def harm(checkpoint: Path) -> None:
        (checkpoint / name).unlink()
        write_manifest(checkpoint)

    return harm


def unreadable(checkpoint: Path) -> None:
    """Puts in the place of a file one that can be opened, but whose reading fails with EIO."""
    (checkpoint / "run.json").unlink()
    (checkpoint / "run.json").symlink_to("/proc/self/mem")


def folder_for_file(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()
    (checkpoint / "config.json").mkdir()


def file_for_checkpoint(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.write_text("")


def nested_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_text(NESTED)


def other_tokenizer(checkpoint: Path) -> None:
    large = train_bpe(["def f(x):\n\treturn x\n" + "abcdefghij" * 50] * 20, 300)
    (checkpoint / "tokenizer" / "tokenizer.json").write_text(large)
    write_manifest(checkpoint)


DAMAGES = {
    "an unreadable file": (unreadable, "run.json cannot be read"),
    "a folder in place of a file": (folder_for_file, "config.json is missing"),
    "a file in place of the checkpoint": (file_for_checkpoint, "manifest.json"),
    "a manifest nested too deep": (nested_manifest, "manifest.json is damaged"),
    "a configuration nested too deep": (replace("config.json", '{"model": ' + NESTED + "}"), "config.json"),
    "a configuration of nothing": (replace("config.json", '{"model": 3}'), "config.json"),
    "no run.json": (remove("run.json"), "run.json"),
    "another step": (replace("run.json", '{"step": 5, "tokens": 1, "data": {}}'), "step 5"),
    "no step": (replace("run.json", '{"step": null, "tokens": 1, "data": {}}'), "step"),
    "a tokenizer with more ids than the model": (other_tokenizer, "293 ids, more than the model's 266"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_whatever_is_wrong_is_named_and_the_one_before_is_used(copy: Path, name: str):
    harm, named = DAMAGES[name]
    folder, lines = RunFolder(copy), []
    harm(folder.checkpoints / "00000006")
    saved = use_newest(folder, lines.append, lambda saved: saved)
    assert saved is not None
    assert saved.position.step == 4
    assert len(lines) == 1
    assert "\n" not in lines[0]
    assert named in lines[0]
    assert "00000004" in lines[0]


def test_arrays_that_cannot_be_read_are_named_and_the_checkpoint_before_is_used(copy: Path, config: RunConfig):
    """The digests are right, since the manifest was made again: the arrays themselves are found to be damaged."""
    remove("arrays/manifest.ocdbt")(RunFolder(copy).checkpoints / "00000006")
    with pytest.warns(UserWarning, match=r"00000006 cannot be used: its arrays cannot be read .*00000004") as found:
        assert load_run(copy).saved.position.step == 4
    assert all("\n" not in str(warning.message) for warning in found)


def test_a_checkpoint_that_is_deleted_while_it_is_read_is_no_damage(copy: Path):
    """A run deletes old checkpoints while another process evaluates it."""
    folder, lines, seen = RunFolder(copy), [], []

    def use(saved: SavedRun) -> int:
        seen.append(saved.position.step)
        if len(seen) == 1:
            shutil.rmtree(saved.path)
            raise DamagedCheckpoint("its arrays cannot be read")
        return saved.position.step

    assert use_newest(folder, lines.append, use) == 4
    assert seen == [6, 4]
    assert not lines


@pytest.mark.parametrize(("keep", "damaged", "left"), [(1, [6], [5]), (2, [6, 4], [2, 5]), (3, [], [4, 5, 6])])
def test_a_run_that_goes_on_from_an_older_checkpoint_keeps_the_good_ones(
    copy: Path, config: RunConfig, keep: int, damaged: list[int], left: list[int]
):
    """The newest are damaged, the run goes on from the one before them and saves step 5."""
    folder = RunFolder(copy)
    state, position = final_state(copy, config)
    for step in damaged:
        (folder.checkpoints / f"{step:08d}" / "run.json").write_text("{}")
    checkpoints = Checkpoints(folder, Tokenizer(byte_tokenizer()), keep=keep)
    checkpoints.save(state, dataclasses.replace(position, step=5), config)
    checkpoints.close()
    kept = [int(path.name) for path in list_checkpoints(folder)]
    assert [step for step in kept if step not in damaged] == left
    found = use_newest(folder, lambda line: None, lambda saved: saved.position.step)
    assert found == max(left)


def test_only_what_the_checkpoint_holds_is_used(copy: Path, config: RunConfig):
    """Another tokenizer in the folder of the run, which nothing verifies, changes nothing."""
    before, data = load_run_with_data(copy)
    other = Tokenizer(train_bpe(["def f(x):\n\treturn x\n" + "abcdefghij" * 50] * 20, 300))
    other.save(RunFolder(copy).tokenizer)
    after, again = load_run_with_data(copy)
    assert after.saved.tokenizer.fingerprint == before.saved.tokenizer.fingerprint == again.tokenizer.fingerprint
    assert again.fingerprint == data.fingerprint
    checkpoints = Checkpoints(RunFolder(copy), data.tokenizer, keep=3)
    checkpoints.save(final_state(copy, config)[0], dataclasses.replace(before.saved.position, step=8), config)
    checkpoints.close()
    saved = use_newest(RunFolder(copy), print, lambda saved: saved)
    assert saved is not None
    assert (saved.position.step, saved.tokenizer.fingerprint) == (8, data.tokenizer.fingerprint)


def change_config(folder: RunFolder, section: str, field: str, value: object) -> None:
    values = json.loads(folder.config.read_text())
    values[section][field] = value
    folder.config.write_text(json.dumps(values))


@pytest.mark.parametrize(("section", "field", "value"), [("training", "beta1", 0.5), ("model", "hidden_size", 64)])
def test_a_changed_configuration_is_named(copy: Path, config: RunConfig, section: str, field: str, value: object):
    """The run's config.json has no digest of its own; the checkpoint's copy of it has."""
    folder = RunFolder(copy)
    change_config(folder, section, field, value)
    with pytest.warns(UserWarning, match=rf"config.json has {section}\.{field} = {value}, but .* saved with"):
        assert load_run(copy).model.config == config.model
    with pytest.raises(UserError, match=rf"00000006 was saved with {section}\.{field} = .*, not {value}") as error:
        train(folder.read_config(), copy)
    assert "\n" not in str(error.value)
    folder.config.write_text("{")
    with pytest.warns(UserWarning, match="the checkpoint's own configuration is used"):
        assert load_run(copy).model.config == config.model


def test_a_changed_corpus_is_named(copy: Path, config: RunConfig, tmp_path: Path):
    corpus = shutil.copytree(config.data.corpus, tmp_path / "corpus")
    moved = dataclasses.replace(config, data=dataclasses.replace(config.data, corpus=str(corpus)))
    for path in list_checkpoints(RunFolder(copy)):
        replace("config.json", json.dumps(moved.to_dict()))(path)
    RunFolder(copy).write_config(moved)
    load_run_with_data(copy)  # the folder may have moved
    for file in corpus.iterdir():
        file.write_text(file.read_text()[::-1])
    for use in (load_run_with_data, lambda folder: train(moved, folder)):
        with pytest.raises(UserError, match=r"data\.corpus differs") as error:
            use(copy)
        assert "\n" not in str(error.value)
