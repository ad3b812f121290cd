"""Checkpoints: one atomic unit from which a run goes on exactly.

checkpoints/<step>/ holds the arrays (orbax: parameters, optimizer, average, router biases, key, counters), run.json
(tokens seen, state of the data iterator), config.json, tokenizer/ and manifest.json with a SHA-256 of every file. It
is written beside itself under a hidden name and renamed when whole, so whatever carries a step's name is complete.
Saving is asynchronous: the arrays are copied out, and training goes on while a thread writes. Of several processes,
which share the folder, each writes the arrays it has, and the first does the rest. Arrays come back laid out as the run
that restores them asks, whatever mesh saved them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx

from dsv3_jax.data import Tokenizer
from dsv3_jax.errors import UserError
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.modules.devices import Devices, OneDevice
from dsv3_jax.precision import Precision
from dsv3_jax.runs.processes import is_first, share
from dsv3_jax.training.config import RunConfig
from dsv3_jax.training.state_layout import StateLayout
from dsv3_jax.runs.manifest import find_damage, write_manifest
from dsv3_jax.runs.folder import RunFolder
from dsv3_jax.training.state import Skeleton, TrainState, new_state


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a run knows beside its arrays.

    Attributes:
      step: steps tried.
      tokens: tokens seen.
      data: state of the data iterator.
    """

    step: int
    tokens: int
    data: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run.

    Args:
      folder: the run.
      keep: how many are kept.
    """

    def __init__(self, folder: RunFolder, *, keep: int):
        self._folder = folder
        self._keep = keep
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None
        self._arrays = ocp.StandardCheckpointer()

    def save(self, state: TrainState, progress: Progress, config: RunConfig) -> None:
        """Starts saving; returns when the arrays are copied and the state may change.

        Raises:
          UserError: this or the previous save failed (a full disk, say).
        """
        self.wait()  # also for the other processes' sake: the first one has ended its save when they come to theirs
        final = self._folder.checkpoints / f"{progress.step:08d}"
        temporary = self._folder.checkpoints / f".writing-{progress.step:08d}"
        try:
            share(lambda: self._make_room(temporary))
            self._arrays.save((temporary / "arrays").absolute(), _to_arrays(state))
        except (OSError, ValueError) as error:
            raise _save_error(self._folder, error) from error
        self._writer = threading.Thread(
            target=self._finish, args=(temporary, final, progress, config), name="checkpoint-writer"
        )
        self._writer.start()

    def _make_room(self, temporary: Path) -> None:
        self._folder.checkpoints.mkdir(exist_ok=True)
        for leftover in self._folder.checkpoints.glob(".writing-*"):
            shutil.rmtree(leftover)
        temporary.mkdir()

    def wait(self) -> None:
        """Waits for the save under way, if any, and raises what it failed with."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._error is not None:
            error, self._error = self._error, None
            raise _save_error(self._folder, error) from error

    def close(self) -> None:
        """Waits, and lets go of the writer."""
        try:
            self.wait()
        finally:
            self._arrays.close()

    def _finish(self, temporary: Path, final: Path, progress: Progress, config: RunConfig) -> None:
        try:
            self._arrays.wait_until_finished()
            if not is_first():
                return
            (temporary / "run.json").write_text(json.dumps(dataclasses.asdict(progress)))
            (temporary / "config.json").write_text(json.dumps(config.to_dict(), indent=1))
            shutil.copytree(self._folder.tokenizer, temporary / "tokenizer")
            write_manifest(temporary)
            if final.exists():
                shutil.rmtree(final)
            os.replace(temporary, final)
            for old in list_checkpoints(self._folder)[: -self._keep]:
                shutil.rmtree(old)
        except BaseException as error:
            self._error = error


def list_checkpoints(folder: RunFolder) -> list[Path]:
    """Checkpoints that carry a step's name, oldest first."""
    if not folder.checkpoints.is_dir():
        return []
    return sorted(path for path in folder.checkpoints.iterdir() if path.name.isdigit())


def last_whole_checkpoint(folder: RunFolder, report: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose every file is as written; damaged ones on the way are reported by name.

    Raises:
      UserError: there are checkpoints, and all are damaged.
    """
    checkpoints = list_checkpoints(folder)
    for index, path in reversed(list(enumerate(checkpoints))):
        damage = find_damage(path)
        if damage is None:
            return path
        before = f"; trying {checkpoints[index - 1].name} before it" if index else ""
        report(f"checkpoint {path} cannot be used: {damage}{before}")
    if checkpoints:
        raise UserError(f"no checkpoint in {folder.checkpoints} is whole; start anew with another --out")
    return None


def restore(
    path: Path, config: RunConfig, make_model: Callable[[], DeepSeekV3], layout: StateLayout | None = None
) -> tuple[Skeleton, TrainState, Progress]:
    """The state saved in a checkpoint, for a run of the same configuration.

    Args:
      layout: where it shall lie; one device unless given.
    """
    skeleton, abstract = abstract_state(config, make_model)
    places = _to_arrays((layout or StateLayout()).of_state(abstract))
    wanted = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[name])
        for name, leaf in _to_arrays(abstract).items()
    }
    with ocp.StandardCheckpointer() as arrays:
        restored = arrays.restore((path / "arrays").absolute(), wanted)
    progress = Progress(**json.loads((path / "run.json").read_text()))
    return skeleton, _from_arrays(abstract, restored), progress


def abstract_state(config: RunConfig, make_model: Callable[[], DeepSeekV3]) -> tuple[Skeleton, TrainState]:
    """Skeleton, and shapes and dtypes of the state, without allocating it."""
    graph, _, rest = nnx.split(nnx.eval_shape(make_model), nnx.Param, ...)
    constants = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), rest)
    return Skeleton(graph, constants), jax.eval_shape(lambda: new_state(make_model(), config)[1])


def load_checkpoint(folder: str | Path) -> tuple[DeepSeekV3, Tokenizer, int]:
    """The model a run has reached, its tokenizer and its step.

    The weights are the running average where the run keeps one; the newest whole checkpoint is used, with a warning
    where a newer one is damaged.

    Raises:
      UserError: no run, or no whole checkpoint.
    """
    run = RunFolder(Path(folder))
    config = run.read_config()
    path = last_whole_checkpoint(run, warnings.warn)
    if path is None:
        raise UserError(f"{run.path} holds no checkpoint yet; let dsv3 train reach its first one")
    skeleton, state, progress = restore(path, config, lambda: make_model(config))
    params = state.params if state.average is None else state.average
    return skeleton.model(params, state.router_biases), Tokenizer.load(path / "tokenizer"), progress.step


def make_model(config: RunConfig, devices: Devices = OneDevice()) -> DeepSeekV3:
    """Returns a model with the run's initial weights, made by one compiled program.

    Args:
      devices: those the model is given; its weights are on one device until a layout shards them.
    """

    @nnx.jit
    def build() -> DeepSeekV3:
        return DeepSeekV3(
            config.model,
            rngs=nnx.Rngs(config.training.seed),
            precision=Precision.preset(config.precision),
            devices=devices,
            remat=config.training.rematerialisation,
        )

    return build()


def _to_arrays(state: TrainState) -> dict[str, Any]:
    """The state (or its shapes or shardings) as a flat dictionary by path, which is what the array store is given."""
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    return {_name(path): _plain(leaf) for path, leaf in flat}


def _from_arrays(like: TrainState, arrays: dict[str, Any]) -> TrainState:
    def restored(path: tuple, leaf: Any) -> Any:
        array = arrays[_name(path)]
        return jax.random.wrap_key_data(array) if _is_key(leaf) else array

    return jax.tree_util.tree_map_with_path(restored, like)


def _name(path: tuple) -> str:
    parts = (getattr(key, "name", getattr(key, "key", getattr(key, "idx", key))) for key in path)
    return ".".join(str(part) for part in parts)


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain(leaf: Any) -> Any:
    if not _is_key(leaf):
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.eval_shape(jax.random.key_data, leaf)
    return jax.random.key_data(leaf)


def _save_error(folder: RunFolder, error: BaseException) -> UserError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"a checkpoint could not be written to {folder.checkpoints}: {reason}; earlier ones are intact")
