"""A rollout as files of a checkpoint, for a run that draws one step ahead of its updates."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np

from dsv3_jax.bounded_json import read_object
from dsv3_jax.post_training.rejection import Completion
from dsv3_jax.post_training.rollouts import Rollout
from dsv3_jax.post_training.tasks import Problem
from dsv3_jax.runs.folder import write_atomically
from dsv3_jax.runs.saved_run import DamagedCheckpoint

_LARGEST = 2**31  # bytes of rollout.json
_JSON, _EXPERTS = "rollout.json", "rollout_experts.npy"


def write_rollout(folder: Path, rollout: Rollout) -> None:
    """Writes a rollout into the folder of a checkpoint."""
    rows = rollout.completions
    experts = [np.stack(row.experts).astype(np.int16) for row in rows if row.experts]
    if experts:
        np.save(folder / _EXPERTS, np.concatenate(experts))
    plain = dataclasses.replace(
        rollout, groups=tuple(tuple(dataclasses.replace(row, experts=()) for row in group) for group in rollout.groups)
    )
    write_atomically(folder / _JSON, json.dumps(dataclasses.asdict(plain)))


def read_rollout(folder: Path) -> Rollout | None:
    """Returns the rollout in the folder of a checkpoint; None without one.

    Raises:
      DamagedCheckpoint: its files do not hold a rollout.
    """
    if not (folder / _JSON).exists():
        return None
    try:
        values = read_object(folder / _JSON, max_bytes=_LARGEST)
        experts = np.load(folder / _EXPERTS, allow_pickle=False) if (folder / _EXPERTS).exists() else None
        start, groups = 0, []
        for prompt, group in zip(values["prompts"], values["groups"], strict=True):
            rows = []
            for row in group:
                read = len(prompt) + len(row["ids"]) - 1  # the model reads all tokens but the last
                chosen = () if experts is None else tuple(experts[start : start + read].astype(np.int32))
                start += read
                arrays = {"ids": tuple(row["ids"]), "logprobs": tuple(row["logprobs"]), "experts": chosen}
                rows.append(Completion(**(row | arrays)))
            groups.append(tuple(rows))
        problems = tuple(Problem(**problem) for problem in values["problems"])
        prompts = tuple(tuple(prompt) for prompt in values["prompts"])
        return Rollout(**(values | {"problems": problems, "prompts": prompts, "groups": tuple(groups)}))
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise DamagedCheckpoint(f"its rollout cannot be read: {error}") from error
