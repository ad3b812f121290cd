"""Several processes that train together: how they find each other, agree, and end when one of them is lost.

Every process runs the same program over its own devices. What is decided from files is decided by the first and told to
the others, so that all take the same turn at the same time; whoever does not is waited for only so long.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dsv3_jax.errors import ConfigError, UserError

LOST = 4
"""Exit code of a process whose peers are lost."""

_LAUNCHERS = {"slurm": "slurm", "openmpi": "ompi", "kubernetes": "k8s", "tpu": "cloud_tpu"}
_STARTING = 1800.0  # seconds that the first step, which is compiled, may take beyond the limit
_LONGEST_MESSAGE = 1 << 16
_FAILURES = ("UNKNOWN", "INTERNAL", "UNAVAILABLE", "ABORTED", "CANCELLED", "DEADLINE_EXCEEDED", "FAILED_PRECONDITION")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """How this process finds the others.

    Attributes:
      coordinator: HOST:PORT of process 0, the same on all; or slurm, openmpi, kubernetes or tpu, which say the rest
        themselves; empty when there is one process only.
      count: how many there are.
      index: which one this is, from 0; -1: JOB_COMPLETION_INDEX, which a Kubernetes Indexed Job sets.
      timeout: seconds without a step after which the others count as lost, and to wait for them at the start.
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
                raise ConfigError(f"processes.count must say how many processes there are, not {self.count}")
            if not 0 <= self.resolved_index < self.count:
                raise ConfigError(
                    f"processes.index must be 0 to {self.count - 1}, one for each process, not {self.index}"
                )
        elif (self.count or self.index != -1) and not launched:
            raise ConfigError("processes.coordinator is missing: HOST:PORT of process 0, the same on all")

    @property
    def resolved_index(self) -> int:
        """`index`, or what the environment of a Kubernetes Indexed Job says."""
        said = os.environ.get("JOB_COMPLETION_INDEX", "")
        return int(said) if self.index == -1 and said.isdigit() else self.index


def join(processes: Processes) -> None:
    """Finds the other processes; to be called before JAX is used.

    Raises:
      UserError: they cannot be found in time, or the launcher named has not started this process.
    """
    if not processes.coordinator:
        return
    # Without this the runtime aborts when a peer is lost, with a page of its own instead of a line that says so.
    jax.config.update("jax_enable_recoverability", True)
    logging.getLogger("jax._src.clusters.cluster").setLevel(logging.CRITICAL)  # what it finds missing is said below
    limits: dict[str, Any] = {
        "initialization_timeout": processes.timeout,
        "heartbeat_timeout_seconds": processes.timeout + 60,  # the vigil speaks first
        "shutdown_timeout_seconds": min(processes.timeout, 60),
    }
    try:
        if processes.coordinator in _LAUNCHERS:
            jax.distributed.initialize(cluster_detection_method=_LAUNCHERS[processes.coordinator], **limits)
        else:
            jax.distributed.initialize(
                processes.coordinator,
                processes.count,
                processes.resolved_index,
                cluster_detection_method="deactivate",
                **limits,
            )
    except (RuntimeError, ValueError, KeyError) as error:
        if processes.coordinator in _LAUNCHERS and not isinstance(error, RuntimeError):  # something is not said
            package = " (or pip install kubernetes is missing)" if processes.coordinator == "kubernetes" else ""
            raise UserError(
                f"processes.coordinator is {processes.coordinator}, which has not started this process{package}: "
                "give HOST:PORT of process 0, a count and an index instead"
            ) from error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the other processes were not found by way of {processes.coordinator}: {reason}; "
            "are all of them started, with the same --processes.coordinator?"
        ) from error


def leave(exit_code: int, timeout: float) -> int:
    """Ends a process that joined others, all of which have come to their end; returns on the first one only.

    The first process serves the others' meeting point, so it must go last. What JAX does at the end of a process does
    not see to that where peers may be lost, and aborts whoever comes late.
    """
    if jax.process_count() > 1:
        from jax._src import distributed  # the one barrier that needs no collective, which an early end could break off

        client = distributed.global_state.client
        if client is not None:
            client.wait_at_barrier("end", round(1000 * timeout))
        if not is_first():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(exit_code)
    return exit_code


def is_first() -> bool:
    """Whether this process speaks and writes for all."""
    return jax.process_index() == 0


def share[T](make: Callable[[], T]) -> T:
    """What `make()` is on the first process, on all of them; plain values that JSON can hold.

    Raises:
      UserError: on the first process, where `make` raised it.
      SystemExit: on the others, where the first one raised; it has said why.
    """
    if jax.process_count() == 1:
        return make()
    message: dict[str, Any] = {}
    problem: BaseException | None = None
    if is_first():
        try:
            message = {"value": make()}
        except BaseException as error:
            problem, message = error, {"problem": type(error).__name__}
    told = json.loads(_broadcast(json.dumps(message).encode()))
    if problem is not None:
        raise problem
    if "problem" in told:
        raise SystemExit(2)
    return told["value"]


def in_turn[T](make: Callable[[], T]) -> T:
    """`make()` on the first process, and on the others when it has ended there: they find what it left in files."""
    if jax.process_count() == 1:
        return make()
    made: list[T] = []
    share(lambda: made.append(make()))
    return made[0] if made else make()


def anywhere(flag: bool) -> bool:
    """Whether `flag` is true on any process; all must ask together."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array([flag]))))


def _broadcast(text: bytes) -> bytes:
    """The first process's bytes, on all."""
    if len(text) > _LONGEST_MESSAGE:
        raise ValueError(f"{len(text)} bytes are too many to tell the other processes")
    padded = np.zeros(_LONGEST_MESSAGE + 4, np.uint8)
    if is_first():
        padded[:4] = np.frombuffer(np.uint32(len(text)).tobytes(), np.uint8)
        padded[4 : 4 + len(text)] = np.frombuffer(text, np.uint8)
    told = np.asarray(multihost_utils.broadcast_one_to_all(padded)).astype(np.uint8)
    size = int(np.frombuffer(told[:4].tobytes(), np.uint32)[0])
    return told[4 : 4 + size].tobytes()


class Vigil:
    """Ends this process when the others are lost: where a collective fails, and where nothing moves for too long.

    A process that waits inside a collective cannot be interrupted by an exception; a thread ends it as a whole.

    Args:
      timeout: seconds; with one process nothing is watched.
      standing: says where the run stands, for the message.
    """

    def __init__(self, timeout: float, standing: Callable[[], str]):
        self._timeout, self._standing = timeout, standing
        self._deadline = time.monotonic() + timeout + _STARTING
        self._stepping = False
        self._ended = threading.Event()
        if jax.process_count() > 1:
            threading.Thread(target=self._watch, name="vigil", daemon=True).start()

    def moved(self, *, by_a_step: bool = True) -> None:
        """Says that a step, or something else, has ended. The limit is longer before the first step: it is compiled."""
        self._stepping |= by_a_step
        if self._stepping:
            self._deadline = time.monotonic() + self._timeout

    def end(self) -> None:
        """Watches no longer: the others are needed no more."""
        self._ended.set()

    def __enter__(self) -> Vigil:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self.end()
        # What a collective fails with comes as one exception or another, but always with a status in front.
        if jax.process_count() > 1 and re.match(rf"({'|'.join(_FAILURES)}): ", str(error)):
            self._give_up(f"a collective failed ({(str(error).splitlines() or ['no reason'])[0][:160]})")

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self._timeout / 4)):
            if time.monotonic() > self._deadline:
                self._give_up(f"nothing has moved for {self._timeout:g} s")

    def _give_up(self, what: str) -> None:
        print(
            f"dsv3: process {jax.process_index()} of {jax.process_count()}: {what}: another process has died or "
            f"hangs. Ended here; {self._standing()}",
            file=sys.stderr,
            flush=True,
        )
        sys.stdout.flush()
        os._exit(LOST)
