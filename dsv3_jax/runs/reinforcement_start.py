"""The start of a run of reinforcement learning: from another run's weights, or from its own newest checkpoint."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp

from dsv3_jax.bounded_json import read_object
from dsv3_jax.data import Tokenizer
from dsv3_jax.errors import UserError
from dsv3_jax.post_training.config import ReinforcementConfig
from dsv3_jax.post_training.policy_step import PolicyState
from dsv3_jax.runs.agreement import is_first
from dsv3_jax.runs.checkpoints import abstract_state, restore_arrays
from dsv3_jax.runs.folder import RunFolder, differences, first_difference, write_atomically
from dsv3_jax.runs.saved_run import RunPosition, SavedRun, use_newest
from dsv3_jax.runs.starting_point import load_starting_point
from dsv3_jax.runs.starting_state import distributed_model, starting_state
from dsv3_jax.terminal import say
from dsv3_jax.training.config import RunConfig
from dsv3_jax.training.state import Skeleton, TrainState
from dsv3_jax.training.state_layout import StateLayout

_LARGEST_SETTINGS = 1_000_000  # bytes of grpo.json


@dataclasses.dataclass(frozen=True)
class ReinforcementStart:
    """What a run of reinforcement learning starts or resumes from.

    Attributes:
      tokenizer: that of the weights.
      skeleton: the model without its parameters.
      state: the policy and its optimizer, on the devices.
      position: steps and tokens, and the number of problems that were used up.
      saved_step: step of the newest checkpoint; -1 where there is none.
      saved_path: its folder; None where there is none.
    """

    tokenizer: Tokenizer
    skeleton: Skeleton
    state: PolicyState
    position: RunPosition
    saved_step: int
    saved_path: Path | None


def read_settings(folder: RunFolder) -> ReinforcementConfig:
    """Reads the settings of the run in a folder.

    Raises:
      UserError: the folder holds a run of another kind, or its settings cannot be read.
    """
    if not folder.grpo.exists():
        raise UserError(f"{folder.path} holds a run that was not started by dsv3 grpo; choose another --out")
    return ReinforcementConfig.from_dict(read_object(folder.grpo, max_bytes=_LARGEST_SETTINGS))


def start_or_resume(
    config: RunConfig, settings: ReinforcementConfig, folder: RunFolder, layout: StateLayout, source: Path
) -> ReinforcementStart:
    """Restores the newest whole checkpoint of the run in `folder`, or starts from the weights of `source`.

    Raises:
      UserError: the folder holds another run, or source or checkpoints cannot be used.
    """
    if folder.holds_run:
        folder.check_same_run(config)
        for name, then, now in differences(read_settings(folder).to_dict(), settings.to_dict()):
            raise UserError(
                f"{folder.path} holds a run with {name} = {then!r}, not {now!r}: give that value to resume it, or "
                "another --out to start a new run"
            )

    def resume(saved: SavedRun) -> ReinforcementStart:
        if difference := first_difference(saved.config, config):
            raise UserError(f"{saved.path} was saved with {difference[0]} = {difference[1]!r}, not {difference[2]!r}")
        make = functools.partial(distributed_model, config, layout)
        skeleton, abstract = abstract_state(config, make)
        wanted = policy_state(abstract, reference=bool(settings.objective.kl_weight))
        state = restore_arrays(saved.path, wanted, layout.of_state(wanted))
        return ReinforcementStart(saved.tokenizer, skeleton, state, saved.position, saved.position.step, saved.path)

    found = use_newest(folder, say, resume)
    if found is not None:
        if is_first() and config.training.steps > folder.read_config().training.steps:
            folder.write_config(config)
        return found
    tokenizer = Tokenizer.load(config.data.tokenizer)
    skeleton, state = starting_state(config, layout, functools.partial(load_starting_point, source, config))
    policy = policy_state(state, reference=False)
    if settings.objective.kl_weight:
        policy = dataclasses.replace(policy, reference=jax.tree.map(jnp.copy, policy.params))
    if is_first():
        tokenizer.save(folder.tokenizer)
        write_atomically(folder.grpo, json.dumps(settings.to_dict(), indent=1) + "\n")
        folder.write_config(config)
    position = RunPosition(step=0, tokens=0, data={"problems": 0})
    return ReinforcementStart(tokenizer, skeleton, policy, position, -1, None)


def policy_state(state: TrainState, *, reference: bool) -> PolicyState:
    """Returns a train state as that of a policy, whose reference is the parameters themselves or None."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return PolicyState(**fields, reference=state.params if reference else None)
