"""Several processes that train together: how they find each other at the start, and how they leave at the end.

Every process runs the same program over its own devices.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from pathlib import Path
from typing import Any

import jax

from dsv3_jax.errors import ConfigError, UserError
from dsv3_jax.runs.agreement import is_first
from dsv3_jax.runs.local_gpus import local_gpus

_LAUNCHERS = {"slurm": "slurm", "openmpi": "ompi", "kubernetes": "k8s", "tpu": "cloud_tpu"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """How this process finds the others, when several train together.

    Attributes:
      coordinator: HOST:PORT of process 0, the same for all processes; or slurm, openmpi, kubernetes or tpu, if one of
        these started the processes (count and index are then not needed). Empty for a single process.
      count: number of processes.
      index: number of this process, from 0; -1 takes it from JOB_COMPLETION_INDEX, which a Kubernetes Indexed Job sets.
      timeout: seconds to wait for the other processes at the start, and without a step before they are taken as lost.
    """

    coordinator: str = ""
    count: int = 0
    index: int = -1
    timeout: int = 300

    def __post_init__(self) -> None:
        if self.timeout < 1:
            raise ConfigError(f"processes.timeout must be at least 1 second, not {self.timeout}")
        launched = self.coordinator in _LAUNCHERS
        if self.coordinator and not launched:
            host, _, port = self.coordinator.rpartition(":")
            if not host or not port.isdigit():
                raise ConfigError(
                    f"processes.coordinator must be HOST:PORT of process 0, such as node0:1234, or one of "
                    f"{', '.join(_LAUNCHERS)}, not '{self.coordinator}'"
                )
            if self.count < 1:
                raise ConfigError(f"processes.count must be the number of processes, not {self.count}")
            if not 0 <= self.resolved_index < self.count:
                raise ConfigError(
                    f"processes.index must be from 0 to {self.count - 1}, different for each process, not {self.index}"
                )
        elif (self.count or self.index != -1) and not launched:
            raise ConfigError(
                "processes.coordinator is missing: give HOST:PORT of process 0, the same for all processes"
            )

    @property
    def resolved_index(self) -> int:
        """The index of this process: `index`, or JOB_COMPLETION_INDEX where that is -1."""
        said = os.environ.get("JOB_COMPLETION_INDEX", "")
        return int(said) if self.index == -1 and said.isdigit() else self.index


def join(processes: Processes) -> None:
    """Connects this process with the others. Must be called before JAX is used.

    Raises:
      UserError: the others were not found in time, or this process was not started by the launcher that is named.
    """
    if not processes.coordinator:
        return
    # Without this JAX aborts when a peer is lost and prints a page of its own; the peer watchdog prints one line.
    jax.config.update("jax_enable_recoverability", True)
    logging.getLogger("jax._src.clusters.cluster").setLevel(logging.CRITICAL)  # the errors below say what is missing
    limits: dict[str, Any] = {
        "initialization_timeout": processes.timeout,
        "heartbeat_timeout_seconds": processes.timeout + 60,  # later than the peer watchdog, whose message is clearer
        "shutdown_timeout_seconds": min(processes.timeout, 60),
    }
    try:
        if processes.coordinator in _LAUNCHERS:
            gpus = local_gpus(os.environ, len(list(Path("/dev").glob("nvidia[0-9]*"))))
            method = _LAUNCHERS[processes.coordinator]
            jax.distributed.initialize(cluster_detection_method=method, local_device_ids=gpus, **limits)
        else:
            jax.distributed.initialize(
                processes.coordinator,
                processes.count,
                processes.resolved_index,
                cluster_detection_method="deactivate",
                **limits,
            )
    except (RuntimeError, ValueError, KeyError) as error:
        if processes.coordinator in _LAUNCHERS and not isinstance(
            error, RuntimeError
        ):  # the launcher has set no such variables
            package = (
                " (or the Python package kubernetes is not installed)" if processes.coordinator == "kubernetes" else ""
            )
            raise UserError(
                f"processes.coordinator is {processes.coordinator}, but it did not start this process{package}: "
                "give HOST:PORT of process 0, a count and an index instead"
            ) from error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the other processes were not found through {processes.coordinator}: {reason}; "
            "check that all of them are started, with the same --processes.coordinator"
        ) from error


def leave(exit_code: int, timeout: float) -> int:
    """Ends this process after the run: the first process waits for the others and returns, the others exit here.

    The first process runs the service that connects all of them, so it must end last. JAX itself does not ensure this
    when peers may be lost; it aborts a process that comes late.

    Args:
      timeout: seconds to wait for the others.
    """
    if jax.process_count() > 1:
        from jax._src import (
            distributed,  # the only barrier without a collective, which could fail when a process ends early
        )

        client = distributed.global_state.client
        if client is not None:
            client.wait_at_barrier("end", round(1000 * timeout))
        if not is_first():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(exit_code)
    return exit_code
