"""Checks that what only some operating systems have can be absent, and that users of others are told at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from simulated import environment

from dsv3_jax.cli import main as command_line
from dsv3_jax.errors import UserError
from dsv3_jax.operating_system import check_supported, restart_with_huge_pages

# A Python without what Windows lacks (fcntl, resource, SIGUSR1) and what macOS lacks (pipe2, affinity, /proc).
_HIDE = """
import os, signal, sys
sys.modules.update(fcntl=None, resource=None)
for name in ("pipe2", "fork", "sched_getaffinity", "sched_setaffinity", "memfd_create"):
    vars(os).pop(name, None)
for name in ("SIGUSR1", "SIGUSR2"):
    delattr(signal, name)
def no_proc(event, arguments):
    if event == "open" and str(arguments[0]).startswith("/proc"):
        raise FileNotFoundError(arguments[0])
sys.addaudithook(no_proc)
"""
_USE = """
import importlib, pkgutil, warnings
from pathlib import Path
import dsv3_jax
from dsv3_jax.errors import UserError
for module in pkgutil.walk_packages(dsv3_jax.__path__, "dsv3_jax."):
    if module.name not in ("dsv3_jax.post_training.sandboxed_child",):  # runs in the sandbox, which is Linux's
        try:
            importlib.import_module(module.name)
        except UserError as error:  # an extra that is not installed
            if "pip install" not in str(error):
                raise
from dsv3_jax.operating_system import call_before_abortion, peak_memory_bytes, processor_flags, processor_name
from dsv3_jax.runs.folder import RunFolder
from dsv3_jax.runs.interruption import Interruption
warnings.simplefilter("ignore")
with Interruption() as interruption, RunFolder(Path(sys.argv[1])).locked():
    interruption.defer = True
    signal.raise_signal(signal.SIGINT)
    while not interruption.requested:
        pass
    print(interruption.exit_code, peak_memory_bytes(), len(processor_flags()), bool(processor_name()))
"""


@pytest.mark.slow
def test_every_module_works_without_what_only_linux_has(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _HIDE + _USE, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120, check=False)
    assert (done.stdout, done.returncode) == ("130 0 0 True\n", 0), done.stderr[-3000:]


@pytest.mark.parametrize(
    ("system", "machine", "named"),
    [("win32", "AMD64", "WSL 2"), ("cygwin", "x86_64", "WSL 2"), ("darwin", "x86_64", "Intel")],
)
def test_users_of_other_systems_are_told(
    system: str, machine: str, named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=named):
        check_supported(system, machine)
    monkeypatch.setattr(command_line, "check_supported", lambda: check_supported(system, machine))
    assert command_line.main(["train"]) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(("system", "machine"), [("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64")])
def test_others_are_not(system: str, machine: str) -> None:
    check_supported(system, machine)


@pytest.fixture
def restarted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Returns a function that returns the variables with which the program is started again; None if it is not."""

    def tunables(setting: str | None, given: str | None = None, system: str = "linux") -> str | None:
        found: list[str] = []

        def start(program: str, arguments: list[str], variables: dict[str, str]) -> None:
            assert (program, arguments[1:]) == (sys.executable, sys.orig_argv[1:])
            assert {"GLIBC_TUNABLES": ""} | dict(os.environ) == variables | {"GLIBC_TUNABLES": given or ""}
            found.append(variables["GLIBC_TUNABLES"])
            raise OSError("started in a test")

        monkeypatch.setattr(sys, "platform", system)
        monkeypatch.setattr(os, "execve", start)
        monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
        if given is not None:
            monkeypatch.setenv("GLIBC_TUNABLES", given)
        file = tmp_path / "enabled"
        if setting is not None:
            file.write_text(setting)
        restart_with_huge_pages(file)
        return found[0] if found else None

    return tunables


def test_huge_pages_are_asked_for_where_linux_gives_them_on_request(restarted: Any) -> None:
    assert restarted("always [madvise] never\n") == "glibc.malloc.hugetlb=1"
    assert (
        restarted("always [madvise] never\n", "glibc.malloc.check=3") == "glibc.malloc.check=3:glibc.malloc.hugetlb=1"
    )


@pytest.mark.parametrize("setting", ["[always] madvise never\n", "always madvise [never]\n", None])
def test_huge_pages_are_not_asked_for_where_it_changes_nothing(restarted: Any, setting: str | None) -> None:
    assert restarted(setting) is None


def test_huge_pages_are_asked_for_once_and_not_against_the_users_will(restarted: Any) -> None:
    assert restarted("[madvise]", "glibc.malloc.hugetlb=1") is None
    assert restarted("[madvise]", "glibc.malloc.hugetlb=0") is None


def test_huge_pages_are_left_alone_on_other_systems(restarted: Any) -> None:
    assert restarted("[madvise]", system="darwin") is None


def test_a_program_that_starts_again_ends_as_it_would_have(tmp_path: Path) -> None:
    """Python reads `sitecustomize` whenever it starts; this one writes down what it is started with."""
    starts = tmp_path / "starts"
    text = f"import os; print(os.environ.get('GLIBC_TUNABLES', ''), file=open({str(starts)!r}, 'a'))"
    (tmp_path / "sitecustomize.py").write_text(text)
    variables = {name: value for name, value in environment().items() if name != "GLIBC_TUNABLES"}
    paths = os.pathsep.join(filter(None, (str(tmp_path), variables.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "dsv3_jax.cli.main", "inspect", str(tmp_path / "nothing")]
    variables |= {"PYTHONPATH": paths}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=120, check=False)
    assert (done.stdout, done.returncode, done.stderr.count("\n")) == ("", 2, 1)
    assert "nothing" in done.stderr
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    on_request = setting.exists() and "[madvise]" in setting.read_text()
    assert starts.read_text().splitlines() == ["", "glibc.malloc.hugetlb=1"][: 1 + on_request]


def test_a_list_of_commands_is_printed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def restart() -> None:
        raise AssertionError("started again")

    monkeypatch.setattr(command_line, "restart_with_huge_pages", restart)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)  # those of the test stay
    monkeypatch.setattr(sys, "argv", ["dsv3", "--help"])
    with pytest.raises(SystemExit) as stop:
        command_line.command()
    assert stop.value.code == 0
    monkeypatch.setattr(sys, "argv", ["dsv3", "train", "--help"])
    with pytest.raises(AssertionError, match="started again"):
        command_line.command()
