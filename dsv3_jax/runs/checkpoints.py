"""Checkpoints, from which a run resumes exactly.

checkpoints/<step>/ holds arrays/ (written by orbax: parameters, optimizer, average, router biases, key, counters),
run.json (step, tokens, position in the data), config.json, tokenizer/ and manifest.json with the SHA-256 of every file.
A checkpoint is written under a hidden name and renamed when it is complete. Saving is asynchronous: the arrays are
copied to host memory, and a thread writes them while training continues. Several processes share the folder: each
writes its own shards of the arrays, and the first writes the other files. A checkpoint can be restored on any mesh.
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
from dsv3_jax.runs.agreement import is_first, share
from dsv3_jax.runs.folder import RunFolder
from dsv3_jax.runs.manifest import find_damage, write_manifest
from dsv3_jax.training.config import RunConfig
from dsv3_jax.training.state import Skeleton, TrainState, new_state
from dsv3_jax.training.state_layout import StateLayout

Tree = Any
"""A train state or part of one: arrays, or their shapes, or their shardings."""


@dataclasses.dataclass(frozen=True)
class RunPosition:
    """How far a run has come. It is saved as run.json next to the arrays.

    Attributes:
      step: steps taken, including those whose update was skipped.
      tokens: tokens seen.
      data: state of the data iterator (`TrainIterator.state`).
    """

    step: int
    tokens: int
    data: dict[str, Any]


class Checkpoints:
    """Saves the checkpoints of one run.

    Args:
      folder: the run.
      keep: number of newest checkpoints to keep; older ones are deleted.
    """

    def __init__(self, folder: RunFolder, *, keep: int):
        self._folder = folder
        self._keep = keep
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None
        self._arrays = ocp.StandardCheckpointer()

    def save(self, state: TrainState, position: RunPosition, config: RunConfig) -> None:
        """Starts to save a checkpoint, and returns when the arrays are copied, so that the state may change.

        Raises:
          UserError: this or the previous save failed, for instance because the disk is full.
        """
        self.wait()  # all processes wait here, so the first has ended its previous save before any starts the next
        final = self._folder.checkpoints / f"{position.step:08d}"
        temporary = self._folder.checkpoints / f".writing-{position.step:08d}"
        try:
            share(lambda: self._make_folder(temporary))
            self._arrays.save((temporary / "arrays").absolute(), _to_arrays(state))
        except (OSError, ValueError) as error:
            raise _save_error(self._folder, error) from error
        self._writer = threading.Thread(
            target=self._finish, args=(temporary, final, position, config), name="checkpoint-writer"
        )
        self._writer.start()

    def _make_folder(self, temporary: Path) -> None:
        self._folder.checkpoints.mkdir(exist_ok=True)
        for leftover in self._folder.checkpoints.glob(".writing-*"):
            shutil.rmtree(leftover)
        temporary.mkdir()

    def wait(self) -> None:
        """Waits for the save that is in progress, if any.

        Raises:
          UserError: the save failed.
        """
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._error is not None:
            error, self._error = self._error, None
            raise _save_error(self._folder, error) from error

    def close(self) -> None:
        """Waits for the save that is in progress and closes the orbax checkpointer."""
        try:
            self.wait()
        finally:
            self._arrays.close()

    def _finish(self, temporary: Path, final: Path, position: RunPosition, config: RunConfig) -> None:
        try:
            self._arrays.wait_until_finished()
            if not is_first():
                return
            (temporary / "run.json").write_text(json.dumps(dataclasses.asdict(position)))
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
    """Returns the complete checkpoints, oldest first."""
    if not folder.checkpoints.is_dir():
        return []
    return sorted(path for path in folder.checkpoints.iterdir() if path.name.isdigit())


def last_whole_checkpoint(folder: RunFolder, report: Callable[[str], None]) -> Path | None:
    """Returns the newest checkpoint whose files are all undamaged, or None where there is no checkpoint.

    Args:
      report: is called with a line about each damaged checkpoint that is newer.

    Raises:
      UserError: all checkpoints are damaged.
    """
    checkpoints = list_checkpoints(folder)
    for index, path in reversed(list(enumerate(checkpoints))):
        damage = find_damage(path)
        if damage is None:
            return path
        before = f"; trying the one before it, {checkpoints[index - 1].name}" if index else ""
        report(f"checkpoint {path} cannot be used: {damage}{before}")
    if checkpoints:
        raise UserError(f"all checkpoints in {folder.checkpoints} are damaged; start a new run with another --out")
    return None


def restore(
    path: Path, config: RunConfig, make_model: Callable[[], DeepSeekV3], layout: StateLayout | None = None
) -> tuple[Skeleton, TrainState, RunPosition]:
    """Restores a checkpoint of a run of the same configuration.

    Args:
      make_model: makes a model of the run; only its structure is used.
      layout: the devices to restore to; one device if not given.
    """
    skeleton, abstract = abstract_state(config, make_model)
    state = _restore_arrays(path, abstract, (layout or StateLayout()).of_state(abstract))
    return skeleton, state, RunPosition(**json.loads((path / "run.json").read_text()))


def _restore_arrays(path: Path, abstract: Tree, shardings: Tree) -> Tree:
    """Restores the arrays whose shapes are in `abstract`: a state, or part of one, of which nothing else is read."""
    by_name = _to_arrays(shardings)
    wanted = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=by_name[name])
        for name, leaf in _to_arrays(abstract).items()
    }
    args = ocp.args.PyTreeRestore(
        item=wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
    )
    with ocp.PyTreeCheckpointer() as arrays:
        restored = arrays.restore((path / "arrays").absolute(), args=args)
    return _from_arrays(abstract, restored)


def abstract_state(config: RunConfig, make_model: Callable[[], DeepSeekV3]) -> tuple[Skeleton, TrainState]:
    """Returns the skeleton of a run's model, and its state with shapes and dtypes in place of arrays."""
    graph, _, rest = nnx.split(nnx.eval_shape(make_model), nnx.Param, ...)
    constants = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), rest)
    return Skeleton(graph, constants), jax.eval_shape(lambda: new_state(make_model(), config)[1])


def load_checkpoint(folder: str | Path, *, devices: Devices = OneDevice()) -> tuple[DeepSeekV3, Tokenizer, int]:
    """Loads the newest undamaged checkpoint of a run. A warning names each newer checkpoint that is damaged.

    Args:
      folder: the run's folder.
      devices: where the parameters are kept: `OneDevice()`, or `OnMesh(mesh)`. They are read straight to there.

    Returns:
      The model, the tokenizer and the step. The weights are the running average, if the run keeps one.

    Raises:
      UserError: the folder holds no run, or no checkpoint that can be used.
    """
    run = RunFolder(Path(folder))
    config = run.read_config()
    path = last_whole_checkpoint(run, warnings.warn)
    if path is None:
        raise UserError(f"{run.path} holds no checkpoint yet; wait until dsv3 train has saved its first one")
    skeleton, state = abstract_state(config, lambda: make_model(config, devices))
    weights = "params" if state.average is None else "average"
    wanted = {weights: getattr(state, weights), "router_biases": state.router_biases}
    restored = _restore_arrays(path, wanted, devices.shardings(wanted))
    model = skeleton.model(restored[weights], restored["router_biases"])
    return model, Tokenizer.load(path / "tokenizer"), int(path.name)


def make_model(config: RunConfig, devices: Devices = OneDevice()) -> DeepSeekV3:
    """Makes a model with the run's initial weights, by one compiled program.

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


def _to_arrays(state: Tree) -> dict[str, Any]:
    """Returns a state (or its shapes or shardings) as a flat dictionary by path, which is what orbax stores."""
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    return {_name(path): _plain(leaf) for path, leaf in flat}


def _from_arrays(like: Tree, arrays: dict[str, Any]) -> Tree:
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
    return UserError(
        f"a checkpoint could not be written to {folder.checkpoints}: {reason}; earlier checkpoints are intact"
    )
