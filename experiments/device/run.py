"""Checks and times all kernels on a lent GPU, in one call that nothing can waste.

    python experiments/device/run.py correctness --jobs 4 --limit 280
    python experiments/device/run.py training --jobs 2 --limit 280
    python experiments/device/run.py timing --jobs 1 --limit 280
    python experiments/device/run.py correctness --interpret      tiny shapes, on a CPU

Every check is a process of its own. One that crashes, hangs or runs out of memory costs the case it was in; the cases
after it run in another process. Each result is one JSON line in results.jsonl under --out ($OUT, or results), on the
disk before the next one is read; the first line names the device, the driver and the versions of the software.
printed.txt has the end of what each process printed. A table comes last. The exit
code is 1 if a case failed, 2 if checks were left out for lack of time.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import selectors
import shutil
import signal
import site
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))

from plan import COMMANDS, Check  # noqa: E402

MOST_STARTS = 4  # of one check, after crashes
ENDING = 5.0  # seconds before the limit at which everything is stopped


@dataclasses.dataclass
class Job:
    """A check waiting for a process."""

    check: Check
    skip: list[str] = dataclasses.field(default_factory=list)
    only: list[str] | None = None  # all cases for None
    no_clusters: bool = False
    compared: bool = False  # with the kernels of the other checkout
    starts: int = 0

    @property
    def title(self) -> str:
        return self.check.name + " [no clusters]" * self.no_clusters + " [compared]" * self.compared


class Process:
    """A running job.

    Attributes:
      case: the case that it is in, or None between cases.
      stop_check, stop_case: when it is stopped, by the limit of the check and of the case.
    """

    def __init__(self, job: Job, interpret: bool, environment: dict[str, str]):
        self.job, self.case, self.buffer = job, None, b""
        self.over = False  # its output has ended
        self.start = time.monotonic()
        self.stop_check = self.start + job.check.limit
        self.stop_case = self.stop_check
        request = {"module": job.check.module, "arguments": job.check.arguments, "tiny": interpret}
        request["timed"] = job.check.timed
        request["interpret"] = interpret and job.check.kernels
        request |= {"skip": job.skip, "only": job.only, "no_clusters": job.no_clusters}
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        self.popen = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py"), json.dumps(request)],
            stdout=subprocess.PIPE,
            stderr=self.errors,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            cwd=ROOT,
            env=environment,
        )

    def lines(self, data: bytes) -> list[dict[str, Any]]:
        *whole, self.buffer = (self.buffer + data).split(b"\n")
        return [json.loads(line) for line in whole if line]

    def kill(self) -> None:
        """Kills the whole session of the process."""
        try:
            os.killpg(self.popen.pid, signal.SIGKILL)
        except ProcessLookupError:
            self.popen.kill()

    def exit_code(self) -> int:
        """Waits until the process is gone. One that the GPU's driver holds in spite of SIGKILL is left behind."""
        try:
            return self.popen.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.kill()
            return -signal.SIGKILL

    def printed(self) -> str:
        """Returns the end of what the process printed."""
        self.errors.seek(max(self.errors.seek(0, os.SEEK_END) - 20_000, 0))
        return self.errors.read().decode(errors="replace")


class Run:
    """Runs checks and collects their results.

    Attributes:
      results: the lines of results.jsonl that say how a case went.
    """

    def __init__(self, out: pathlib.Path, limit: float, jobs: int, interpret: bool = False, compare: str | None = None):
        self.out, self.jobs, self.interpret = out, jobs, interpret
        self.start = time.monotonic()
        self.limit = limit
        self.results: list[dict[str, Any]] = []
        self.left_out: list[str] = []
        out.mkdir(parents=True, exist_ok=True)
        self.file = (out / "results.jsonl").open("a")
        self.printed = (out / "printed.txt").open("a")
        self.compare = compare
        self.lock = tempfile.NamedTemporaryFile()  # noqa: SIM115
        self.write(kind="machine", **machine())

    def checks(self, checks: Sequence[Check], only: Sequence[str] = ()) -> None:
        """Runs checks, as many at once as there are jobs; returns when all ended or the time is up."""
        chosen = [check for check in checks if not only or any(word in check.name for word in only)]
        waiting = [
            Job(check, compared=compared)
            for check in chosen
            for compared in ((False, True) if self.compare and check.timed else (False,))
        ]
        running: dict[int, Process] = {}
        try:
            self.supervise(waiting, running)
        finally:
            for process in running.values():
                process.kill()

    def supervise(self, waiting: list[Job], running: dict[int, Process]) -> None:
        """Starts the waiting jobs, reads what they report, and stops those that are over their limits."""
        selector = selectors.DefaultSelector()
        end = self.start + self.limit - ENDING
        while waiting or running:
            now = time.monotonic()
            while waiting and len(running) < self.jobs and now < end:
                job = waiting.pop(0)
                process = Process(job, self.interpret, self.environment(job))
                process.job.starts += 1
                running[process.popen.stdout.fileno()] = process
                selector.register(process.popen.stdout, selectors.EVENT_READ)
            if now >= end:
                self.left_out += [job.title for job in waiting]
                waiting = []
            if not running:
                continue
            for key, _ in selector.select(timeout=0.1):
                process = running[key.fd]
                data = os.read(key.fd, 1 << 16)
                for line in process.lines(data):
                    self.take(process, line)
                if not data:
                    process.over = True
            now = time.monotonic()
            for fd, process in list(running.items()):
                stop = min(end, process.stop_check, process.stop_case)
                if now > stop:
                    process.kill()
                if process.over or now > stop + 5:
                    selector.unregister(process.popen.stdout)
                    del running[fd]
                    waiting[:0] = self.ended(process)
        selector.close()

    def environment(self, job: Job) -> dict[str, str]:
        path = [self.compare] if self.compare and job.compared else []
        return environment(self.interpret, path) | {"DEVICE_LOCK": self.lock.name}

    def take(self, process: Process, line: dict[str, Any]) -> None:
        """Stores a line of a process."""
        if line["kind"] == "started":
            process.case = line["case"]
            process.stop_case = time.monotonic() + process.job.check.case_limit
            self.write(check=process.job.title, **line)
            return
        if line["kind"] == "result":
            process.case, process.stop_case = None, process.stop_check
            self.result(process.job, line)
            return
        if line["kind"] == "note":
            self.write(check=process.job.title, case=process.case, **line)
            return
        limit = process.job.check.limit if line["kind"] == "waiting" else process.job.check.case_limit
        process.stop_case = time.monotonic() + limit

    def result(self, job: Job, line: dict[str, Any]) -> None:
        line = {"check": job.title, **line}
        job.skip.append(line["case"])
        self.results.append(line)
        self.write(**line)

    def ended(self, process: Process) -> list[Job]:
        """Records how a process ended; returns what must run because of it."""
        job, code = process.job, process.exit_code()
        seconds = time.monotonic() - process.start
        out_of_time = time.monotonic() > self.start + self.limit - ENDING
        self.write(kind="process", check=job.title, code=code, seconds=round(seconds, 1))
        if text := process.printed():
            self.printed.write(f"==== {job.title}, start {job.starts}, exit code {code}\n{text}\n")
            self.printed.flush()
        more: list[Job] = []
        if code:
            reason = f"exit code {code}" if code > 0 else signal.Signals(-code).name
            if code == -signal.SIGKILL:
                over = time.monotonic() > min(process.stop_check, process.stop_case)
                reason = "no time left" if out_of_time else f"stopped after {seconds:.0f} s" if over else "killed"
            case = process.case or ("(between cases)" if job.skip else "(start)")
            if process.case or code != 3:
                failed = {"kind": "result", "case": case, "passed": False, "message": reason}
                self.result(job, failed | {"seconds": round(seconds, 1)})
            started = process.case is not None or code == 3
            if started and job.starts < MOST_STARTS and not out_of_time:
                more.append(job)
        if not more and job.check.clusters and not job.no_clusters and not out_of_time:
            failed = [r["case"] for r in self.results if r["check"] == job.title and not r["passed"]]
            if failed:
                more.append(Job(job.check, only=failed, no_clusters=True, compared=job.compared))
        return more

    def write(self, **line: Any) -> None:
        line["at"] = round(time.monotonic() - self.start, 1)
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        os.fsync(self.file.fileno())


PACKAGES = (
    *("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt", "flax", "optax", "orbax-checkpoint", "numpy"),
    *("torch", "triton", "nvidia-cudnn-cu13", "nvidia-cublas"),
)


def machine() -> dict[str, Any]:
    """Returns what identifies a measurement: the device and its driver, the versions of the software, the time."""
    now = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
    found: dict[str, Any] = {"time": now, "python": platform.python_version()}
    fields = "name,memory.total,memory.used,driver_version,clocks.sm,clocks.max.sm,power.limit"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    if shutil.which(command[0]):
        with contextlib.suppress(subprocess.TimeoutExpired):
            done = subprocess.run(command, capture_output=True, text=True, timeout=20)
            found["gpu"] = (done.stdout + done.stderr).strip()[:300]
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def environment(interpret: bool, path: Sequence[str] = ()) -> dict[str, str]:
    """Returns the environment of the processes: where they find modules and compilers, and how they take memory."""
    tools = [
        "/usr/local/cuda/bin",
        *(str(p) for s in site.getsitepackages() for p in pathlib.Path(s).glob("nvidia/*/bin")),
    ]
    modules = [*path, str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    cache = pathlib.Path(tempfile.gettempdir()) / "device_jax_cache"
    found = {
        **os.environ,
        "PATH": os.pathsep.join([*filter(os.path.isdir, tools), os.environ.get("PATH", "")]),
        "PYTHONPATH": os.pathsep.join(modules),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "PYTHONUNBUFFERED": "1",
    }
    # An interpreted kernel's programs wait for one another in callbacks, each of which takes a thread of XLA.
    return found | ({"JAX_PLATFORMS": "cpu", "PJRT_NPROC": "16"} if interpret else {})


HIDDEN = ("profile", "kind", "check", "case", "passed", "seconds", "at", "message", "error", "tolerance")


def table(results: Sequence[dict[str, Any]]) -> str:
    """Returns the report: a line per check for comparisons that passed, a line per case otherwise, failures last."""
    plain = [r for r in results if r["passed"] and "error" in r and "ms" not in r]
    lines = []
    for check in dict.fromkeys(r["check"] for r in plain):
        of_check = [r for r in plain if r["check"] == check]
        worst = max(of_check, key=lambda r: r["error"] / r["tolerance"] if r["tolerance"] else 0)
        error = f"worst error {_short(worst['error'])} of {_short(worst['tolerance'])} ({worst['case']})"
        lines.append(f"ok   {check} | {len(of_check)} cases | {error} | {sum(r['seconds'] for r in of_check):.0f} s")
    for r in sorted((r for r in results if r not in plain), key=lambda r: not r["passed"]):
        line = f"{'ok  ' if r['passed'] else 'FAIL'} {r['check']} | {r['case']} | {r.get('seconds', 0):.1f} s"
        if "error" in r:
            line += f" | error {_short(r['error'])} of {_short(r['tolerance'])}"
        others = [f"{k} {_short(v)}" for k, v in r.items() if k not in HIDDEN and v not in (0, None)]
        lines.append(" | ".join([line, *others, *filter(None, [r.get("message")])]))
        lines += [f"         {kernel}" for kernel in r.get("profile", ())]
    return "\n".join(lines)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="+", choices=[*COMMANDS, "all"])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(os.environ.get("OUT", "results")))
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="checks whose name contains one of these")
    parser.add_argument("--limit", type=float, default=280, help="seconds for everything")
    parser.add_argument("--jobs", type=int, default=4, help="processes at once; one of them at a time is timed")
    parser.add_argument(
        "--compare", metavar="DIR", help="checkout whose pallas_kernels is timed too, beside this one's"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the checks")
    parser.add_argument("--interpret", action="store_true", help="tiny shapes, kernels interpreted on the CPU")
    options = parser.parse_args(arguments)
    commands = [c for c in COMMANDS if c in ("smoke", *options.commands) or "all" in options.commands]
    if options.list:
        print("\n".join(check.name for command in commands for check in COMMANDS[command]))
        return 0
    run = Run(options.out.resolve(), options.limit, options.jobs, options.interpret, options.compare)
    run.checks([check for command in commands for check in COMMANDS[command]], options.only)
    print(table(run.results))
    failed = sum(not r["passed"] for r in run.results)
    print(f"{len(run.results) - failed} passed, {failed} failed, not run: {', '.join(run.left_out) or 'none'}")
    return 1 if failed else 2 if run.left_out else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the processes, which are in sessions of their own
    sys.exit(main())
