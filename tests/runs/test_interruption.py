"""Checks what a signal does while a program prepares, works, and is in code that is not Python's."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from simulated import environment

# Waits in native code that does not come back for a signal, as compiling and tokenising do not.
_NATIVE = "import hashlib; print('ready', flush=True); hashlib.pbkdf2_hmac('sha256', b'', b'', 60_000_000)"


def start(program: str) -> subprocess.Popen[str]:
    """Starts a Python program with an `Interruption` called `interruption`, and waits until it prints `ready`."""
    text = "import os, signal, time\nfrom dsv3_jax.runs.interruption import Interrupted, Interruption\n"
    text += "interruption = Interruption(lambda: 'last words')\n" + textwrap.dedent(program)
    process = subprocess.Popen(
        [sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_the_first_signal_interrupts_preparations():
    process = start(
        """
        try:
            with interruption:
                print('ready', flush=True)
                time.sleep(60)
        except Interrupted as stop:
            print(stop.exit_code)
        """
    )
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=50) == ("143\n", "")
    assert process.returncode == 0


def test_an_interruption_that_became_another_exception_is_one():
    """Python reports what is raised while an extension module starts as an ImportError of its own."""
    process = start(
        """
        try:
            with interruption:
                try:
                    print('ready', flush=True)
                    time.sleep(60)
                except BaseException as error:
                    raise ImportError('initialization failed') from error
        except Interrupted as stop:
            print(stop.exit_code)
        """
    )
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=50) == ("143\n", "")


def test_the_first_signal_is_kept_for_a_program_that_asks():
    process = start(
        """
        with interruption:
            interruption.defer = interruption.unsaved = True
            print('ready', flush=True)
            while interruption.signal_number is None:
                time.sleep(0.01)
            time.sleep(2.5)  # longer than the time after which a program that has nothing to save is ended
            assert interruption.requested
            print(interruption.exit_code)
        """
    )
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=50) == ("130\n", "")


@pytest.mark.parametrize("defer", [False, True])
def test_native_code_with_nothing_to_save_is_ended(defer: bool):
    process = start(f"with interruption:\n    interruption.defer = {defer}\n    {_NATIVE}")
    time.sleep(0.3)  # until it is in native code
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=50) == ("", "last words\n")
    assert process.returncode == 143
    assert time.monotonic() - began < 10


def test_a_signal_in_a_callback_whose_exceptions_python_ignores():
    process = start(
        """
        import gc
        def callback(phase, info):
            print('ready', flush=True)
            time.sleep(60)
        with interruption:
            gc.callbacks.append(callback)
            gc.collect()
            time.sleep(60)
        """
    )
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=50) == ("", "last words\n")
    assert process.returncode == 143


def test_two_signals_in_native_code_end_it_at_once():
    """Python counts signals that come while native code runs as one."""
    process = start(f"with interruption:\n    interruption.defer = interruption.unsaved = True\n    {_NATIVE}")
    time.sleep(0.3)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    assert process.wait(50) == 143


def test_a_signal_during_imports_is_one_line(tmp_path: Path):
    """A command's imports are slow; here they take a minute."""
    (tmp_path / "tyro.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)\n")
    path = f"{tmp_path}:{environment()['PYTHONPATH']}"
    process = subprocess.Popen(
        [sys.executable, "-m", "dsv3_jax.cli.main", "train", "--out", str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(PYTHONPATH=path),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=50)[1] == "dsv3: stopped\n"
    assert process.returncode == 130
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("notice", "sent", "code"), [("USR2", "USR2", 128 + signal.SIGUSR2), ("none", "USR1", 130)])
def test_the_signal_before_the_end_of_a_job_can_be_chosen(notice: str, sent: str, code: int):
    """A signal that is not chosen is ignored, so that the SIGINT that follows decides."""
    process = start(
        f"""
        with Interruption(notice={notice!r}) as interruption:
            interruption.defer = interruption.unsaved = True
            print('ready', flush=True)
            while not interruption.requested:
                time.sleep(0.01)
            print(interruption.exit_code)
        """
    )
    process.send_signal(signal.Signals[f"SIG{sent}"])
    if notice == "none":
        process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=50) == (f"{code}\n", "")
