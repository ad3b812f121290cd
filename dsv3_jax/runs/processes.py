"""Several processes that train together: how they find each other at the start, and how they leave at the end.

Every process runs the same program over its own devices.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from dsv3_jax.bounds import check_bounds
from dsv3_jax.errors import ConfigError, UserError, reason_of
from dsv3_jax.operating_system import call_before_abortion
from dsv3_jax.runs.local_gpus import local_gpus
from dsv3_jax.runs.peers import PEERS_LOST, Peers, find_peers, say_last_words

_LAUNCHERS = {"slurm": "slurm", "openmpi": "ompi", "kubernetes": "k8s", "tpu": "cloud_tpu"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """How this process finds the others, when several train together.

    Attributes:
      coordinator: HOST:PORT of process 0, the same for all processes (one of the ports after it is used too); or
        slurm, openmpi, kubernetes or tpu, if one of these started the processes (count and index are then not needed).
        Empty for a single process.
      count: number of processes.
      index: number of this process, from 0; -1 takes it from JOB_COMPLETION_INDEX, which a Kubernetes Indexed Job sets.
      timeout: seconds to wait for the other processes at the start, and without a step before they are taken as lost.
    """

    coordinator: str = ""
    count: int = 0
    index: int = -1
    timeout: int = 300

    def __post_init__(self) -> None:
        check_bounds(self, {"count": (0, 2**20), "index": (-1, 2**20), "timeout": (1, 10**7)}, "processes.")
        launched = self.coordinator in _LAUNCHERS
        if self.coordinator and not launched:
            host, _, port = self.coordinator.rpartition(":")
            if not host or not (port.isascii() and port.isdigit() and 0 < int(port[:9]) < 65536):
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


def join(processes: Processes, options: dict[str, Any]) -> Peers | None:
    """Connects this process with the others. Must be called before JAX is used.

    Args:
      options: everything that must be the same for all processes, by name.

    Returns:
      The other processes; None where there are none.

    Raises:
      UserError: the others were not found in time or were started with other options, or this process was not started
        by the launcher that is named.
    """
    if not processes.coordinator:
        return None
    address, count, index, devices = _launched(processes) if processes.coordinator in _LAUNCHERS else _given(processes)
    if count == 1:
        return None
    peers = find_peers(address, index, count, options, processes.timeout)
    # JAX aborts when a peer is lost, and prints pages of its own; `Peers` prints one line.
    jax.config.update("jax_enable_recoverability", True)
    jax.config.update("jax_enable_preemption_service", False)
    with _without_abortion(peers):
        try:
            jax.distributed.initialize(
                f"{address.rpartition(':')[0]}:{peers.port}",
                count,
                index,
                local_device_ids=devices,
                cluster_detection_method="deactivate",
                initialization_timeout=processes.timeout,
                heartbeat_timeout_seconds=processes.timeout + 60,  # later than `Peers`, whose message is clearer
                shutdown_timeout_seconds=min(processes.timeout, 60),
            )
        except RuntimeError as error:
            raise UserError(
                f"JAX cannot connect the processes through port {peers.port}: {reason_of(error)}"
            ) from error
    return peers


def leave(peers: Peers | None, exit_code: int) -> int:
    """Ends this process after the run: the first process waits for the others and returns, the others exit here.

    The first process runs the service that connects all of them, so it must end last. JAX itself does not ensure this
    when peers may be lost; it aborts a process that comes late.
    """
    if peers is not None:
        peers.wait_for_all()
        if peers.index:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(exit_code)
    return exit_code


@contextlib.contextmanager
def ending_together(peers: Peers | None) -> Iterator[None]:
    """Ends this process and the others where the block fails: they may be waiting for this one."""
    try:
        yield
    except BaseException as error:
        if peers is None:
            raise
        known = isinstance(error, UserError | SystemExit)
        peers.end_all(2 if known else 1, str(error) if isinstance(error, UserError) else "it failed")
        if isinstance(error, UserError):
            say_last_words(str(error))
        elif not known:
            traceback.print_exc()
        os._exit(2 if known else 1)


def _given(processes: Processes) -> tuple[str, int, int, None]:
    return processes.coordinator, processes.count, processes.resolved_index, None


def _launched(processes: Processes) -> tuple[str, int, int, Sequence[int] | None]:
    """Returns address, count, index and device ids that the launcher gave this process."""
    from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize itself asks

    logging.getLogger("jax._src.clusters.cluster").setLevel(logging.CRITICAL)  # the error below says what is missing
    method = _LAUNCHERS[processes.coordinator]
    try:
        address, count, index, devices = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, method, processes.timeout
        )
    except (RuntimeError, ValueError, KeyError):
        address = count = index = devices = None
    if address is None or count is None or index is None:
        kubernetes = processes.coordinator == "kubernetes"
        package = " (or the Python package kubernetes is not installed)" if kubernetes else ""
        raise UserError(
            f"processes.coordinator is {processes.coordinator}, but it did not start this process{package}: "
            "give HOST:PORT of process 0, a count and an index instead"
        )
    gpus = local_gpus(os.environ, len(list(Path("/dev").glob("nvidia[0-9]*"))))
    return address, count, index, devices if gpus is None else gpus


@contextlib.contextmanager
def _without_abortion(peers: Peers) -> Iterator[None]:
    """Makes JAX's client of the block end this process by `peers` when it has lost the service.

    By default it prints a page and aborts. jax.distributed.initialize has no argument for this.
    """
    from jax._src.lib import _jax  # pyright: ignore[reportPrivateImportUsage]

    def lose(*status: object) -> None:
        peers.lose(PEERS_LOST, "the connection with process 0 was lost")

    # jaxlib 0.11 cannot convert the status that it calls back with, and calls C++'s terminate handler instead.
    call_before_abortion(lose)
    make = _jax.get_distributed_runtime_client
    _jax.get_distributed_runtime_client = functools.partial(make, missed_heartbeat_callback=lose)
    try:
        yield
    finally:
        _jax.get_distributed_runtime_client = make
