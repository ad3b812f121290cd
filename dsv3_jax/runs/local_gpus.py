"""Decides which GPUs of a node a process uses that a launcher has started.

JAX itself takes one GPU per process, the one with the process's number on the node. With one process per node, the
other GPUs would be idle.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping


def local_gpus(environment: Mapping[str, str], on_node: int) -> list[int] | None:
    """Returns the numbers of the GPUs that this process uses, among those that it sees; None leaves it to JAX.

    A process that sees fewer GPUs than the node has was given its own by the launcher and uses them all. Otherwise the
    processes of a node share the GPUs evenly, and a warning says how many are left over.

    Args:
      environment: the variables of this process.
      on_node: number of GPUs of the node, if Slurm does not say; 0 where it is not known.
    """
    processes, index = _of_slurm(environment) or _of_openmpi(environment) or (0, 0)
    if not processes or "JAX_LOCAL_DEVICE_IDS" in environment:
        return None
    total = _number(environment.get("SLURM_GPUS_ON_NODE")) or on_node
    named = environment.get("CUDA_VISIBLE_DEVICES")
    seen = total if named is None else len([name for name in named.split(",") if name.strip()])
    if not seen:
        return None
    if seen < total or seen < processes:
        return list(range(seen))
    share, left = divmod(seen, processes)
    if left and not index:
        warnings.warn(
            f"{left} of this node's {seen} GPUs stay idle, because each of its {processes} processes uses {share}: "
            "start another number of processes per node",
            stacklevel=2,
        )
    return list(range(index * share, (index + 1) * share))


def _of_slurm(environment: Mapping[str, str]) -> tuple[int, int] | None:
    """Returns the number of processes on this node, and the number of this one among them."""
    counts: list[int] = []
    described = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE") or ""
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", described):
        counts += [int(count)] * min(int(times or 1), 1_000_000)
    index, node = _number(environment.get("SLURM_LOCALID")), _number(environment.get("SLURM_NODEID"))
    processes = counts[node or 0] if counts and (node or 0) < len(counts) else None
    processes = processes or _number(environment.get("SLURM_NTASKS_PER_NODE"))
    return None if not processes or index is None or index >= processes else (processes, index)


def _of_openmpi(environment: Mapping[str, str]) -> tuple[int, int] | None:
    processes = _number(environment.get("OMPI_COMM_WORLD_LOCAL_SIZE"))
    index = _number(environment.get("OMPI_COMM_WORLD_LOCAL_RANK"))
    return None if not processes or index is None or index >= processes else (processes, index)


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() and len(text) < 10 else None
