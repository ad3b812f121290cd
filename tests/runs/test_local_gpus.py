"""Checks that the processes of a node use all its GPUs, each of them once, however the launcher started them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_jax.runs.local_gpus import local_gpus

SLURM = {"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_GPUS_ON_NODE": "8"}


@pytest.mark.parametrize(
    ("changes", "gpus"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "1"}, range(8)),
        ({"SLURM_NTASKS_PER_NODE": "1"}, range(8)),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x4)", "SLURM_LOCALID": "5"}, [5]),
        ({"SLURM_STEP_TASKS_PER_NODE": "4,2(x3)", "SLURM_LOCALID": "1", "SLURM_NODEID": "2"}, range(4, 8)),
        ({"SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_LOCALID": "5", "CUDA_VISIBLE_DEVICES": "5"}, [0]),
        ({"SLURM_STEP_TASKS_PER_NODE": "1", "CUDA_VISIBLE_DEVICES": "2,3"}, [0, 1]),
        ({"SLURM_STEP_TASKS_PER_NODE": "1", "JAX_LOCAL_DEVICE_IDS": "0"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "1", "CUDA_VISIBLE_DEVICES": ""}, None),
        ({}, None),
        ({"SLURM_LOCALID": "x", "SLURM_STEP_TASKS_PER_NODE": "1"}, None),
    ],
)
def test_slurm(changes: dict[str, str], gpus: range | list[int] | None) -> None:
    assert local_gpus(SLURM | changes, 0) == (None if gpus is None else list(gpus))


def test_without_a_launcher_jax_decides() -> None:
    assert local_gpus({}, 8) is None


@given(processes=st.integers(1, 16), share=st.integers(1, 8))
def test_every_gpu_is_used_once(processes: int, share: int) -> None:
    names = {"OMPI_COMM_WORLD_LOCAL_SIZE": str(processes)}
    used = [
        local_gpus(names | {"OMPI_COMM_WORLD_LOCAL_RANK": str(index)}, processes * share) for index in range(processes)
    ]
    assert list(itertools.chain(*(gpus or [] for gpus in used))) == list(range(processes * share))


def test_gpus_that_are_left_over_are_mentioned_once() -> None:
    names = {"OMPI_COMM_WORLD_LOCAL_SIZE": "3"}
    with pytest.warns(UserWarning, match="2 of this node's 8 GPUs stay idle") as said:
        used = [local_gpus(names | {"OMPI_COMM_WORLD_LOCAL_RANK": str(index)}, 8) for index in range(3)]
    assert (used, len(said)) == ([[0, 1], [2, 3], [4, 5]], 1)
