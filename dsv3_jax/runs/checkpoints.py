"""Checkpoints, from which a run resumes exactly.

checkpoints/<step>/ holds arrays/ (written by orbax: parameters, optimizer, average, router biases, key, counters),
run.json (step, tokens, position in the data), config.json, tokenizer/ and manifest.json with the SHA-256 of every file.
A checkpoint is written under a hidden name and renamed when it is complete. Saving is asynchronous: the arrays are
copied to host memory, and a thread writes them while training continues. Several processes share the folder: each
writes its own shards of the arrays, and the first writes the other files. A checkpoint can be restored on any mesh.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import shutil
import sys
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
from dsv3_jax.errors import UserError, reason_of
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.modules.devices import Devices, OneDevice
from dsv3_jax.precision import Precision
from dsv3_jax.precision.fp8_weight import Fp8Weight
from dsv3_jax.runs.agreement import is_first, share
from dsv3_jax.runs.folder import RunFolder, first_difference
from dsv3_jax.runs.manifest import file_stamps, find_damage, write_manifest
from dsv3_jax.runs.retention import superseded
from dsv3_jax.runs.saved_run import DamagedCheckpoint, RunPosition, SavedRun, list_checkpoints, use_newest
from dsv3_jax.training.adapters import Adapters, with_adapters
from dsv3_jax.training.config import RunConfig
from dsv3_jax.training.state import Skeleton, TrainState, new_state
from dsv3_jax.training.state_layout import StateLayout

Tree = Any
"""A train state or part of one: arrays, or their shapes, or their shardings."""


class Checkpoints:
    """Saves the checkpoints of one run.

    Args:
      folder: the run.
      tokenizer: the run's tokenizer, which is saved along.
      keep: number of undamaged checkpoints to keep (`retention.superseded`).
    """

    def __init__(self, folder: RunFolder, tokenizer: Tokenizer, *, keep: int):
        self._folder, self._tokenizer = folder, tokenizer
        self._keep = keep
        self._whole: dict[Path, Any] = {}  # stamps of the files of checkpoints, when their digests were right
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None
        self._arrays = ocp.StandardCheckpointer()
        _silence_orbax()

    def save(
        self,
        state: TrainState,
        position: RunPosition,
        config: RunConfig,
        write_more: Callable[[Path], None] = lambda folder: None,
    ) -> None:
        """Starts to save a checkpoint, and returns when the arrays are copied, so that the state may change.

        Args:
          write_more: writes further files into the folder of the checkpoint.

        Raises:
          UserError: this or the previous save failed, for instance because the disk is full.
        """
        self.wait()  # all processes wait here, so the first has ended its previous save before any starts the next
        final = self._folder.checkpoints / f"{position.step:08d}"
        temporary = self._folder.checkpoints / f".writing-{position.step:08d}"
        try:
            share(lambda: self._make_folder(temporary))
            self._arrays.save((temporary / "arrays").absolute(), _stored(_to_arrays(state)))
        except (OSError, ValueError) as error:
            raise _save_error(self._folder, error) from error
        self._writer = threading.Thread(
            target=self._finish, args=(temporary, final, position, config, write_more), name="checkpoint-writer"
        )
        self._writer.start()

    def _make_folder(self, temporary: Path) -> None:
        self._folder.checkpoints.mkdir(exist_ok=True)
        for leftover in (*self._folder.checkpoints.glob(".writing-*"), *self._folder.checkpoints.glob(".deleted-*")):
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

    def _finish(
        self,
        temporary: Path,
        final: Path,
        position: RunPosition,
        config: RunConfig,
        write_more: Callable[[Path], None],
    ) -> None:
        try:
            self._arrays.wait_until_finished()
            if not is_first():
                return
            (temporary / "run.json").write_text(json.dumps(dataclasses.asdict(position)), encoding="utf-8")
            (temporary / "config.json").write_text(json.dumps(config.to_dict(), indent=1), encoding="utf-8")
            self._tokenizer.save(temporary / "tokenizer")
            write_more(temporary)
            write_manifest(temporary)
            if os.path.lexists(final):
                _delete(final)
            os.replace(temporary, final)
            self._whole[final] = file_stamps(final)
            present = {int(path.name): path for path in list_checkpoints(self._folder)}
            for step in superseded(present, position.step, self._keep, lambda step: self._is_whole(present[step])):
                _delete(present[step])
        except BaseException as error:
            self._error = error

    def _is_whole(self, path: Path) -> bool:
        """Returns whether a checkpoint is undamaged; reads it only if its files have changed since it last was."""
        stamps = file_stamps(path)
        if stamps is None or self._whole.get(path) != stamps:
            if find_damage(path) is not None:
                return False
            self._whole[path] = stamps
        return True


def _delete(path: Path) -> None:
    """Deletes a checkpoint, so that at no time there is a part of one under its name."""
    hidden = path.with_name(f".deleted-{path.name}")
    os.replace(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def restore(
    path: Path, config: RunConfig, make_model: Callable[[], DeepSeekV3], layout: StateLayout | None = None
) -> tuple[Skeleton, TrainState]:
    """Restores the state in a checkpoint of a run of the same configuration.

    Args:
      make_model: makes a model of the run; only its structure is used.
      layout: the devices to restore to; one device if not given.

    Raises:
      DamagedCheckpoint: the arrays cannot be read.
    """
    skeleton, abstract = abstract_state(config, make_model)
    return skeleton, restore_arrays(path, abstract, (layout or StateLayout()).of_state(abstract))


def restore_arrays(path: Path, abstract: Tree, shardings: Tree) -> Tree:
    """Returns the arrays of a checkpoint whose shapes are in `abstract`: a state, or the part of one that is read.

    Raises:
      DamagedCheckpoint: the arrays cannot be read.
    """
    by_name = _to_arrays(shardings)
    wanted = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=by_name[name])
        for name, leaf in _stored(_to_arrays(abstract)).items()
    }
    args = ocp.args.PyTreeRestore(
        item=wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
    )
    _silence_orbax()
    try:
        with ocp.PyTreeCheckpointer() as arrays:
            restored = arrays.restore((path / "arrays").absolute(), args=args)
    except (OSError, ValueError, KeyError, TypeError) as error:  # not what devices raise, such as too little memory
        raise DamagedCheckpoint(f"its arrays cannot be read ({reason_of(error)})") from error
    return _from_arrays(abstract, restored, by_name)


def abstract_state(config: RunConfig, make_model: Callable[[], DeepSeekV3]) -> tuple[Skeleton, TrainState]:
    """Returns the skeleton of a run's model, and its state with shapes and dtypes in place of arrays."""
    graph, _, rest = nnx.split(nnx.eval_shape(make_model), nnx.Param, ...)
    constants = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), rest)
    return Skeleton(graph, constants), jax.eval_shape(lambda: new_state(make_model(), config)[1])


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """The model of a checkpoint, and what the checkpoint holds beside it.

    Attributes:
      model: the model; its weights are the running average, if the run keeps one.
      saved: position, configuration and tokenizer.
      adapters: low-rank adapters, which are added to the model's weights already; None if the run has none.
    """

    model: DeepSeekV3
    saved: SavedRun
    adapters: Adapters | None = None


def load_run(
    folder: str | Path,
    *,
    step: int | None = None,
    devices: Devices = OneDevice(),
    dtype: jax.typing.DTypeLike | None = None,
) -> LoadedRun:
    """Loads the newest undamaged checkpoint of a run. A warning names each newer checkpoint that is damaged.

    Nothing but the checkpoint is used: its digests cover its own copies of configuration and tokenizer.

    Args:
      folder: the run's folder.
      step: the checkpoint to load; the newest that is undamaged if not given.
      devices: where the parameters are kept: `OneDevice()`, or `OnMesh(mesh)`. They are read straight to there.
      dtype: dtype of the parameters, such as "bfloat16"; that of the checkpoint, float32, if not given.

    Raises:
      UserError: the folder holds no run, or no checkpoint that can be used.
    """
    run = RunFolder(Path(folder))

    def load(saved: SavedRun) -> LoadedRun:
        skeleton, state = abstract_state(saved.config, lambda: make_model(saved.config, devices))
        weights = "params" if state.average is None else "average"
        kept = _in_dtype(getattr(state, weights), dtype)
        wanted = {weights: kept, "router_biases": state.router_biases, "adapters": state.adapters}
        restored = restore_arrays(saved.path, wanted, devices.shardings(wanted))
        params, adapters = restored[weights], restored["adapters"]
        if adapters is not None:
            params = with_adapters(params, adapters, saved.config.lora)
        return LoadedRun(skeleton.model(params, restored["router_biases"]), saved, adapters)

    loaded = use_newest(run, warnings.warn, load, step)
    if loaded is None:
        run.read_config()  # raises where the folder holds no run at all
        raise UserError(f"{run.path} holds no checkpoint yet; wait until dsv3 train has saved its first one")
    _warn_of_changes(run, loaded.saved.config)
    return loaded


def _in_dtype(params: Tree, dtype: jax.typing.DTypeLike | None) -> Tree:
    """Returns the shapes of parameters with another dtype; weights kept in FP8 stay as they are."""

    def cast(leaf: Any) -> Any:
        return leaf if isinstance(leaf, Fp8Weight) else jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype)

    return jax.tree.map(cast, params, is_leaf=lambda leaf: isinstance(leaf, Fp8Weight))


def _warn_of_changes(run: RunFolder, saved: RunConfig) -> None:
    """Warns where the run's config.json is not what the checkpoint was saved with."""
    try:
        difference = first_difference(saved, run.read_config())
    except UserError as error:
        warnings.warn(f"{error}; the checkpoint's own configuration is used", stacklevel=3)
        return
    if difference:
        name, then, now = difference
        warnings.warn(
            f"{run.config} has {name} = {now!r}, but the checkpoint was saved with {then!r}, which is used",
            stacklevel=3,
        )


def load_checkpoint(
    folder: str | Path,
    *,
    step: int | None = None,
    devices: Devices = OneDevice(),
    dtype: jax.typing.DTypeLike | None = None,
) -> tuple[DeepSeekV3, Tokenizer, int]:
    """Loads a checkpoint of a run as `load_run` does; returns model, tokenizer and step."""
    loaded = load_run(folder, step=step, devices=devices, dtype=dtype)
    return loaded.model, loaded.saved.tokenizer, loaded.saved.position.step


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
            attention=config.training.attention,
        )

    return build()


def _to_arrays(state: Tree) -> dict[str, Any]:
    """Returns a state (or its shapes or shardings) as a flat dictionary by path, which is what orbax stores."""
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    return {_name(path): _plain(leaf) for path, leaf in flat}


def _stored(arrays: dict[str, Any]) -> dict[str, Any]:
    """Returns those arrays that are stored: orbax refuses empty ones, such as the biases of a model without routers."""
    return {name: array for name, array in arrays.items() if array.size}


def _from_arrays(like: Tree, arrays: dict[str, Any], shardings: dict[str, Any]) -> Tree:
    def restored(path: tuple, leaf: Any) -> Any:
        name = _name(path)
        array = arrays[name] if leaf.size else jnp.zeros(leaf.shape, leaf.dtype, device=shardings[name])
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


@functools.cache
def _silence_orbax() -> None:
    """Keeps orbax and tensorstore from printing pages about an error that they raise as well."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    report = sys.unraisablehook

    def report_others(raised: sys.UnraisableHookArgs) -> None:
        if str(raised.exc_value) != "Event loop is closed":  # a read or write that ended after another one had failed
            report(raised)

    sys.unraisablehook = report_others


def _save_error(folder: RunFolder, error: BaseException) -> UserError:
    return UserError(
        f"a checkpoint could not be written to {folder.checkpoints}: {reason_of(error)}; earlier checkpoints are intact"
    )
