"""The start of a run: its devices, its data, and its state, either new or from the newest checkpoint."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax

from dsv3_jax.data import Data, Tokenizer, TrainIterator, prepare_data
from dsv3_jax.errors import UserError
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.modules.devices import Devices
from dsv3_jax.pipeline.passes import check_passes
from dsv3_jax.pipeline.slots import moe_layers_of_stages
from dsv3_jax.precision.automatic import automatic_recipe
from dsv3_jax.runs.agreement import any_process, first_process_first, is_first, share
from dsv3_jax.runs.checkpoints import restore
from dsv3_jax.runs.folder import RunFolder, first_difference
from dsv3_jax.runs.saved_run import RunPosition, SavedRun, use_newest
from dsv3_jax.runs.starting_state import distributed_model, starting_state
from dsv3_jax.terminal import say
from dsv3_jax.training.config import RunConfig
from dsv3_jax.training.state import Skeleton, TrainState
from dsv3_jax.training.state_layout import StateLayout

_MANY_EPOCHS = 40  # more repetitions add almost nothing (Muennighoff et al., 2023)


@dataclasses.dataclass(frozen=True)
class Continuation:
    """The checkpoint that a new run goes on from, with its optimizer and at its step, in a folder of its own.

    Attributes:
      folder: the run that the checkpoint belongs to.
      step: the checkpoint's step; None for the newest.
    """

    folder: RunFolder
    step: int | None = None


@dataclasses.dataclass(frozen=True)
class RunStart:
    """What a run starts or resumes from.

    Attributes:
      config: the run's configuration, with its number of steps.
      data: the tokenised corpus and its tokenizer.
      rows: this process's training rows, at the next row to read.
      skeleton: the model without its parameters.
      state: parameters, optimizer and the rest, on the devices.
      position: step, tokens and data position.
      saved_step: step of the newest checkpoint; -1 where there is none.
    """

    config: RunConfig
    data: Data
    rows: TrainIterator
    skeleton: Skeleton
    state: TrainState
    position: RunPosition
    saved_step: int


def run_layout(config: RunConfig) -> StateLayout:
    """Returns the run's layout over all devices.

    Raises:
      ConfigError: the mesh does not fit the devices, the model or the batch.
    """
    sizes = config.mesh.resolve(jax.device_count())
    sizes.check(config.model, config.training.rows_per_pass, config.data.sequence_length)
    layers = moe_layers_of_stages(config.model, sizes.stage)
    if sizes.stage > 1:
        training = config.training
        check_passes(
            training.pipeline_schedule,
            sizes.stage,
            batch_size=training.batch_size,
            rows_per_pass=training.rows_per_pass,
            batch_ranks=sizes.batch_ranks,
        )
    return StateLayout.of(sizes, zero=config.training.zero, overlap=config.training.overlap_exchange, layers=layers)


def with_known_precision(
    config: RunConfig, folder: RunFolder, continuation: Continuation | None
) -> tuple[RunConfig, str]:
    """Returns the configuration with a recipe for the precision `auto`, and why a new run is given that one.

    A run that goes on has its own recipe, and no reason is given. The recipe is saved with the run, so that a run that
    goes on computes the same on any machine.
    """
    if config.precision != "auto":
        return config, ""
    source = folder if folder.holds_run or continuation is None else continuation.folder
    if source.holds_run:
        return dataclasses.replace(config, precision=source.read_config().precision), ""
    name, reason = share(lambda: automatic_recipe(config.model.hidden_size))
    return dataclasses.replace(config, precision=name), f"precision auto is {name} here: {reason}"


def start_or_resume(
    config: RunConfig,
    folder: RunFolder,
    layout: StateLayout,
    initial_model: Callable[[Devices], DeepSeekV3] | None,
    continuation: Continuation | None = None,
    epochs: float | None = None,
) -> RunStart:
    """Prepares the data, then restores the newest whole checkpoint or makes a new state.

    Args:
      initial_model: returns the model that a new run starts from.
      continuation: what a new run goes on from instead.
      epochs: passes over the data, which set the number of steps of a run that is not resumed.

    Raises:
      UserError: the data or all checkpoints cannot be used.
    """
    source = folder

    def resume(saved: SavedRun) -> tuple[SavedRun, tuple[Skeleton, TrainState]]:
        if not saved.position.data:
            raise UserError(
                f"{source.path} holds an imported model, which has no training state: start a new run from it with "
                f"--init-from {source.path} and another --out"
            )
        if "problems" in saved.position.data:
            raise UserError(
                f"{source.path} holds a run of reinforcement learning: resume it with dsv3 grpo, or start a new run "
                f"from it with --init-from {source.path} and another --out"
            )
        if source is not folder:
            _check_continued(saved, config)
        elif difference := first_difference(saved.config, config):
            name, then, now = difference
            raise UserError(
                f"{saved.path} was saved with {name} = {then!r}, not {now!r}: restore that value (in {folder.config}, "
                "if it was changed there), or choose another --out"
            )
        return saved, restore(saved.path, config, functools.partial(distributed_model, config, layout), layout)

    found = use_newest(folder, say, resume)
    if found is None and continuation is not None:
        source = continuation.folder
        found = use_newest(source, say, resume, continuation.step)
        if found is None:
            raise UserError(f"{source.path} holds no checkpoint to go on from")
    saved = found[0] if found else None
    data = first_process_first(lambda: _prepare_data(config, folder, layout, saved and saved.tokenizer))
    _check_same_data(data)
    rows = data.train_iterator()
    if found:
        (skeleton, state), position = found[1], found[0].position
        if source is folder or position.data.get("fingerprint") == data.fingerprint:
            rows.set_state(position.data)
        else:
            say("the data are not those of the run that this one goes on from, so they are read from their start")
            position = dataclasses.replace(position, data=rows.state(), validation_at_start=None)
    else:
        if epochs is not None:
            steps = -(-data.rows_of(epochs) // config.training.batch_size)
            config = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=steps))
        skeleton, state = starting_state(config, layout, initial_model)
        position = RunPosition(step=0, tokens=0, data=rows.state())
    if is_first():
        say(_epochs(config, layout, data))
        if position.step >= config.training.steps:
            say(f"the run has taken all of its {config.training.steps} steps; a larger --steps makes it longer")
        if source is not folder:
            say(f"going on from step {position.step} of {source.path}")
        elif found and config.training.steps > found[0].config.training.steps:
            say(
                f"the run is made longer, from {found[0].config.training.steps} to {config.training.steps} steps: all "
                "schedules are fractions of the whole run, so they go on from where a run of that length would be"
            )
        # Written last, so that a start that fails leaves no run in the folder.
        if not folder.holds_run or _is_extended(folder.read_config(), config):
            folder.write_config(config)
    saved_step = position.step if found and source is folder else -1
    return RunStart(config, data, rows, skeleton, state, position, saved_step)


def _check_continued(saved: SavedRun, config: RunConfig) -> None:
    """Checks that a run can go on from a checkpoint of another: its arrays and the meaning of its ids are the same.

    Raises:
      UserError: it cannot; the message names what differs.
    """
    then = saved.config
    for name, before, now in (
        *((f"model.{name}", value, config.model.to_dict()[name]) for name, value in then.model.to_dict().items()),
        ("data.tokenizer", then.data.tokenizer, config.data.tokenizer),
        ("training.optimizer", then.training.optimizer, config.training.optimizer),
        ("training.moment_dtype", then.moment_dtype, config.moment_dtype),
        ("training.ema_decay above 0", then.training.ema_decay > 0, config.training.ema_decay > 0),
    ):
        if before != now:
            raise UserError(f"{saved.path} was saved with {name} = {before!r}, not {now!r}: give that value to go on")
    if saved.position.step >= config.training.steps:
        raise UserError(f"{saved.path} has taken all of the {config.training.steps} steps: give a larger --steps")


def _is_extended(started: RunConfig, config: RunConfig) -> bool:
    """Returns whether the run is made longer, or reads its corpus from where that was moved to."""
    return config.training.steps > started.training.steps or config.data.corpus != started.data.corpus


def _epochs(config: RunConfig, layout: StateLayout, data: Data) -> str:
    """Returns a line that says how often the run reads its corpus."""
    readings = data.readings(config.total_tokens(layout.batch_ranks))
    times = ", ".join(f"{times:,.3g} times" + f" {name}" * (len(readings) > 1) for name, times in readings.items())
    line = f"the corpus has {data.num_train_tokens:,} training tokens, which the run reads {times}"
    many = max(readings.values()) > _MANY_EPOCHS
    return f"{line}; give a larger --data.corpus or fewer --steps" if many else line


def _prepare_data(config: RunConfig, folder: RunFolder, layout: StateLayout, tokenizer: Tokenizer | None) -> Data:
    """Returns the data of this process; `tokenizer` is that of the checkpoint, if there is one."""
    feeding = layout.feed
    data = prepare_data(
        config.data,
        folder.cache,
        tokenizer=tokenizer,
        shard_index=feeding.index,
        shard_count=feeding.count,
        progress=say if is_first() else None,
    )
    size = data.tokenizer.vocab_size
    if size > config.model.vocab_size:
        raise UserError(
            f"the tokenizer has {size} ids, more than model.vocab_size ({config.model.vocab_size}): "
            f"give --model.vocab-size {size} or a smaller tokenizer"
        )
    if is_first() and tokenizer is None:
        data.tokenizer.save(folder.tokenizer)
    return data


def _check_same_data(data: Data) -> None:
    """Checks that this process has the data of the first one.

    Raises:
      UserError: on this process, where it has not.
      SystemExit: where another process has not, which prints the reason.
    """
    expected = share(lambda: data.fingerprint)
    different = sorted(name for name, value in data.fingerprint.items() if expected.get(name) != value)
    if different:
        problem = f"data.{different[0]} of this process is not that of process 0: all must read the same files"
    if any_process(bool(different)):
        raise UserError(problem) if different else SystemExit(2)
