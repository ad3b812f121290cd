"""A rollout as files of a checkpoint, for a run that draws one step ahead, and as bytes, for the other processes."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

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
    text, experts = _parts(rollout)
    if experts is not None:
        np.save(folder / _EXPERTS, experts)
    write_atomically(folder / _JSON, text)


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
        return _from_parts(values, experts)
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise DamagedCheckpoint(f"its rollout cannot be read: {error}") from error


def rollout_to_bytes(rollout: Rollout) -> bytes:
    """Returns a rollout as bytes, which `rollout_from_bytes` reads."""
    text, experts = _parts(rollout)
    arrays: dict[str, Any] = {"text": np.frombuffer(text.encode(), np.uint8)} | (
        {} if experts is None else {"experts": experts}
    )
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def rollout_from_bytes(data: bytes) -> Rollout:
    """Returns the rollout that another process of the run has made into bytes."""
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return _from_parts(json.loads(arrays["text"].tobytes()), arrays.get("experts"))


def _parts(rollout: Rollout) -> tuple[str, np.ndarray | None]:
    """Returns a rollout as JSON, and the experts of all its tokens where they were recorded."""
    experts = [np.stack(row.experts).astype(np.int16) for row in rollout.completions if row.experts]
    plain = dataclasses.replace(
        rollout, groups=tuple(tuple(dataclasses.replace(row, experts=()) for row in group) for group in rollout.groups)
    )
    return json.dumps(dataclasses.asdict(plain)), np.concatenate(experts) if experts else None


def _from_parts(values: dict[str, Any], experts: np.ndarray | None) -> Rollout:
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
