"""The trials of `soak.py` that need no process of their own: damaged checkpoints and malformed model folders."""

from __future__ import annotations

import contextlib
import hashlib
import io
import random
import shutil
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import jax
import numpy as np
from flax import nnx

from dsv3_jax.cli.main import main as dsv3
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.runs.checkpoints import load_run
from dsv3_jax.runs.folder import RunFolder
from dsv3_jax.runs.manifest import find_damage, write_manifest
from dsv3_jax.runs.saved_run import list_checkpoints

_LONGEST = 60  # seconds that a malformed folder may take


def reference_parameters(run: Path) -> dict[int, str]:
    """Returns the digest of the parameters in each checkpoint of a run, by its step."""
    return {int(path.name): _parameters_digest(run, int(path.name)) for path in list_checkpoints(RunFolder(run))}


def damaged_checkpoints(run: Path) -> list[str]:
    """Returns what is wrong with each checkpoint of a run that is damaged."""
    return [damage for path in list_checkpoints(RunFolder(run)) if (damage := find_damage(path))]


def _parameters_digest(run: Path, step: int) -> str:
    """Returns the digest of the parameters in one checkpoint."""
    with tempfile.TemporaryDirectory(dir=run.parent) as alone:
        shutil.copytree(run / "checkpoints" / f"{step:08d}", Path(alone, "checkpoints", f"{step:08d}"))
        shutil.copy(run / "config.json", alone)
        return _digest(load_run(alone).model)


def _digest(model: DeepSeekV3) -> str:
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(model)):
        digest.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    return digest.hexdigest()


def damage_and_load(run: Path, good: dict[int, str], folder: Path, drawn: random.Random) -> str:
    """Damages one or two checkpoints of a copy of a run, and loads the newest that is left; returns what is wrong."""
    copy = folder / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("cache", "tensorboard", "*.png"))
    newest = list_checkpoints(RunFolder(copy))[::-1]
    done = [_damage(path, drawn) for path in newest[: drawn.choice([1, 1, 2])]]
    expected = int(newest[len(done)].name)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loaded = load_run(copy)
        step, said = loaded.saved.position.step, [str(warning.message) for warning in caught]
        if step != expected or _digest(loaded.model) != good[step]:
            return f"{done}: step {step} was used, not {expected}"
        if len(said) != len(done) or any("\n" in line for line in said):
            return f"{done}: {said}"
        return ""
    except Exception as error:
        return f"{done}: {type(error).__name__}: {str(error)[:200]}"
    finally:
        shutil.rmtree(folder)


def _damage(checkpoint: Path, drawn: random.Random) -> str:
    """Damages one file of a checkpoint and says how."""
    path = drawn.choice(sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size))
    content = bytearray(path.read_bytes())
    place = drawn.randrange(len(content))
    kind = drawn.choice(["flip", "cut", "zero", "append", "delete", "folder", "EIO", "deep", "lose", "all"])
    name = path.relative_to(checkpoint)
    if kind in ("flip", "cut", "zero", "append"):
        changed = {
            "flip": bytes([*content[:place], content[place] ^ 1 << drawn.randrange(8), *content[place + 1 :]]),
            "cut": bytes(content[:place]),
            "zero": bytes(content[:place]) + bytes(len(content) - place),
            "append": bytes(content) + b"\0",
        }[kind]
        if changed == content:  # zeros that were there
            changed = changed[:-1]
        path.write_bytes(changed)
    elif kind == "delete":
        path.unlink()
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "EIO":
        path.unlink()
        path.symlink_to("/proc/self/mem")
    elif kind == "deep":
        name = drawn.choice(["manifest.json", "config.json", "run.json"])
        (checkpoint / name).write_text('{"model":' * 50_000)
        if name != "manifest.json":
            write_manifest(checkpoint)
    elif kind == "lose":
        name = drawn.choice(["run.json", "config.json", "tokenizer/tokenizer.json", "arrays/manifest.ocdbt"])
        (checkpoint / name).unlink()
        write_manifest(checkpoint)
    else:
        shutil.rmtree(checkpoint)
        checkpoint.write_text("")
    return f"{kind} {name}"


def published_model(run: Path, folder: Path) -> Path:
    """Exports the model of a run as a published checkpoint."""
    with contextlib.redirect_stdout(io.StringIO()):
        assert dsv3(["export-hf", str(run), str(folder)]) == 0
    return folder


def import_malformed(model: Path, folder: Path, drawn: random.Random) -> str:
    """Imports a published model with something wrong in its files; returns what is wrong with the answer."""
    copy = folder / "model"
    shutil.copytree(model, copy)
    done = [drawn.choice(_MALFORMATIONS)(copy, drawn) for _ in range(drawn.choice([1, 1, 2]))]
    printed, errors = io.StringIO(), io.StringIO()
    try:
        with _limited(_LONGEST), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
            code = dsv3(["import-hf", str(copy), str(folder / "run")])
        lines = [line for line in errors.getvalue().splitlines() if not line.startswith("dsv3: note:")]
        if (code, len(lines)) not in ((0, 0), (2, 1)):
            return f"{done}: exit code {code}, {lines[:3]}"
        return "" if (folder / "run").exists() == (code == 0) else f"{done}: something was left"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{done}: {type(error).__name__}: {str(error)[:200]}"
    finally:
        shutil.rmtree(folder)


@contextlib.contextmanager
def _limited(seconds: int) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not answered after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _any_file(folder: Path, drawn: random.Random) -> Path:
    return drawn.choice(sorted(path for path in folder.iterdir() if path.is_file() and path.stat().st_size))


def _flip(folder: Path, drawn: random.Random) -> str:
    path = _any_file(folder, drawn)
    content = bytearray(path.read_bytes())
    for _ in range(drawn.choice([1, 3, 20])):  # headers are at the start
        content[min(int(drawn.expovariate(1 / 400)), len(content) - 1)] = drawn.randrange(256)
    path.write_bytes(content)
    return f"flip {path.name}"


def _cut(folder: Path, drawn: random.Random) -> str:
    path = _any_file(folder, drawn)
    path.write_bytes(path.read_bytes()[: drawn.randrange(path.stat().st_size)])
    return f"cut {path.name}"


def _replace(folder: Path, drawn: random.Random) -> str:
    path = _any_file(folder, drawn)
    path.unlink()
    kind = drawn.choice(["nothing", "folder", "link to itself", "deep", "zeros"])
    if kind == "folder":
        path.mkdir()
    elif kind == "link to itself":
        path.symlink_to(path.name)
    elif kind == "deep":
        path.write_text("[" * 100_000)
    elif kind == "zeros":
        path.write_bytes(bytes(10_000))
    return f"{kind} for {path.name}"


def _change_value(folder: Path, drawn: random.Random) -> str:
    """Puts an absurd value into config.json, the index or the tokenizer in place of a number or a string."""
    path = drawn.choice(sorted(folder.glob("*.json")))
    if not path.is_file():
        return "nothing"
    words = path.read_text(errors="replace").split(": ")
    place = drawn.randrange(len(words))
    value = drawn.choice(["-1", "0", "1e999", "NaN", "null", '""', "[]", "{}", "9" * 30, "9" * 5000, '"x"', "true"])
    rest = words[place].partition(",")
    words[place] = value + rest[1] + rest[2]
    path.write_text(": ".join(words))
    return f"{value:.20} in {path.name}"


_MALFORMATIONS: tuple[Callable[[Path, random.Random], str], ...] = (_flip, _cut, _replace, _change_value)
