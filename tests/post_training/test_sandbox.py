"""Programs that try to break out of the sandbox, to harm the machine, or to get a reward without solving the task."""

from __future__ import annotations

import glob
import os
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from dsv3_jax.post_training.sandbox import SandboxLimits, SandboxResult, call_in_sandbox, why_unavailable

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
SHORT = SandboxLimits(seconds=0.6, memory_bytes=256 << 20, disk_bytes=1 << 20, output_bytes=4096)


def processes() -> list[str]:
    """Returns the command lines of programs in this process's sandboxes."""
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if line.endswith("-B /tmp/program.py")]


def attempt(body: str, limits: SandboxLimits = SHORT) -> SandboxResult:
    """Runs `body` as the body of a function without arguments; what it returns is the answer."""
    lines = "\n".join("    " + line for line in body.strip().splitlines())
    return call_in_sandbox(f"def attempt():\n{lines}\n", "attempt", [[]], limits)


def test_results_come_back() -> None:
    found = call_in_sandbox("def f(a, b):\n    print('x')\n    return [a + b, 'é']", "f", [[1, 2], [3, 4]], SHORT)
    assert found == SandboxResult("answered", ([3, "é"], [7, "é"]), "x\nx\n")


# Each returns True if it had its way.
ESCAPES = {
    "read the password file": "return bool(open('/etc/passwd').read())",
    "read the environment of its parent": "return bool(open('/proc/1/environ').read())",
    "read its own environment": "import os\nreturn set(os.environ) - {'LANG', 'LC_CTYPE'} != set()",
    "list other processes": "import os\nreturn os.path.exists('/proc/self')",
    "read home folders": "import os\nreturn any(os.path.exists(f'/{x}/.bashrc') for x in ('root', 'home'))",
    "read this project": f"import os\nreturn os.path.exists({str(Path(__file__).resolve())!r})",
    "see other temporary files": "import os\nreturn os.listdir('/tmp') != ['program.py']",
    "import the project": "import dsv3_jax\nreturn True",
    "write beside Python": "import os\nopen(os.__file__ + '.x', 'w').write('x')\nreturn True",
    "change Python itself": "import os\nopen(os.__file__, 'a').write('x')\nreturn True",
    "write to the root folder": "open('/x', 'w').write('x')\nreturn True",
    "write to libraries": "open('/lib/x', 'w').write('x')\nreturn True",
    "open a device": "open('/dev/mem', 'rb').read(1)\nreturn True",
    "make a device": "import os, stat\nos.mknod('/tmp/d', 0o600 | stat.S_IFBLK, os.makedev(8, 0))\nreturn True",
    "read a disk": "import glob\nreturn bool(glob.glob('/dev/sd*') + glob.glob('/dev/vd*'))",
    "mount": "import ctypes\nreturn ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0",
    "unmount": "import ctypes\nreturn ctypes.CDLL(None).umount2(b'/lib', 2) == 0",
    "leave the root folder": (
        "import os\nos.mkdir('/tmp/a')\nos.chroot('/tmp/a')\nfor _ in range(50):\n    os.chdir('..')\n"
        "os.chroot('.')\nreturn os.path.exists('/etc/passwd')"
    ),
    "walk out by ..": "import os\nreturn os.path.exists('/../../../../etc/passwd')",
    "link out": "import os\nos.symlink('/etc/passwd', '/tmp/l')\nreturn bool(open('/tmp/l').read())",
    "make a user namespace": "import os\nos.unshare(os.CLONE_NEWUSER)\nreturn True",
    "make a mount namespace": "import os\nos.unshare(os.CLONE_NEWNS)\nreturn True",
    "enter its parent's namespace": "import os\nfd = os.open('/proc/1/ns/net', 0)\nos.setns(fd)\nreturn True",
    "become root": "import os\nos.setuid(0)\nreturn True",
    "become root by a saved user": "import os\nos.setresuid(-1, 0, -1)\nreturn True",
    "be root": "import os\nreturn 0 in os.getresuid()",
    "join groups": "import os\nos.setgroups([0])\nreturn True",
    "have rights": (
        "import ctypes\nhead = (ctypes.c_uint * 2)(0x20080522, 0)\ndata = (ctypes.c_uint * 6)()\n"
        "return ctypes.CDLL(None).capget(head, data) != 0 or data[0] | data[3] != 0"
    ),
    "start a shell": "import subprocess\nreturn subprocess.run(['/bin/sh', '-c', 'true']).returncode == 0",
    "set the clock": "import time\ntime.clock_settime(time.CLOCK_REALTIME, 0)\nreturn True",
    "set the host's name": "import socket\nsocket.sethostname('x')\nreturn True",
    "raise its limits": ("import resource\nresource.setrlimit(resource.RLIMIT_NPROC, (1000, 1000))\nreturn True"),
    "raise its memory": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))\nreturn True",
    "raise its priority": "import os\nos.nice(-10)\nreturn True",
    "resolve a name": "import socket\nsocket.getaddrinfo('example.com', 80)\nreturn True",
    "connect to an address": "import socket\nsocket.create_connection(('8.8.8.8', 53), timeout=0.3)\nreturn True",
    "send a datagram": (
        "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('8.8.8.8', 53))\nreturn True"
    ),
    "open a raw socket": "import socket\nsocket.socket(socket.AF_PACKET, socket.SOCK_RAW)\nreturn True",
    "trace its parent": "import ctypes\nreturn ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0",
    "read standard input": "import sys\nreturn bool(sys.stdin.read())",
    "find open files of its parent": (
        "import os\nfound = []\nfor fd in range(3, 64):\n    try:\n        os.fstat(fd)\n        found.append(fd)\n"
        "    except OSError:\n        pass\nreturn len(found) > 1"
    ),
    "read the kernel's log": (
        "import ctypes\nreturn ctypes.CDLL(None).klogctl(3, ctypes.create_string_buffer(64), 64) > 0"
    ),
    "load a kernel module": "import ctypes\nreturn ctypes.CDLL(None).syscall(313, 0, b'', 0) == 0",
    "reboot": "import ctypes\nreturn ctypes.CDLL(None).reboot(0) == 0",
}


@pytest.mark.parametrize("body", ESCAPES.values(), ids=ESCAPES)
def test_nothing_outside_is_reached(body: str) -> None:
    found = attempt(body)
    assert found.outcome in ("failed", "answered"), found
    assert found.answers in ((), (False,)), found


def test_a_server_of_this_machine_is_not_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        found = attempt(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=0.3)\nreturn True")
        assert found.outcome == "failed"


def test_signals_do_not_reach_the_parent() -> None:
    seen = []
    old = signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
    try:
        for body in (
            f"import os\nos.kill({os.getpid()}, {int(signal.SIGUSR1)})\nreturn True",
            f"import os\nos.kill(os.getppid() or {os.getpid()}, {int(signal.SIGUSR1)})\nreturn os.getppid() != 0",
            f"import os\nos.killpg({os.getpgid(0)}, {int(signal.SIGUSR1)})\nreturn True",
        ):
            assert attempt(body).answers in ((), (False,))
        assert attempt(f"import os\nos.kill(-1, {int(signal.SIGUSR1)})\nreturn True").outcome in ("failed", "answered")
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert not seen


GREEDY = {
    "runs for ever": "while True:\n    pass",
    "sleeps for ever": "import time\ntime.sleep(1000)",
    "ignores signals": (
        "import signal\nfor s in (1, 2, 3, 10, 12, 13, 14, 15):\n    signal.signal(s, signal.SIG_IGN)\n"
        "while True:\n    pass"
    ),
    "forks for ever": "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
    "leaves a daemon": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(1000)\n"
        "    os._exit(0)\ntime.sleep(1000)"
    ),
    "starts threads for ever": (
        "import threading, time\nwhile True:\n    try:\n"
        "        threading.Thread(target=time.sleep, args=(99,)).start()\n    except RuntimeError:\n        pass"
    ),
    "prints for ever": "while True:\n    print('x' * 1000)",
    "prints in one go": "import sys\nsys.stdout.write('x' * 50_000_000)\nreturn 1",
}


@pytest.mark.parametrize("body", GREEDY.values(), ids=GREEDY)
def test_it_ends_in_time_and_leaves_nothing(body: str) -> None:
    begun = time.monotonic()
    found = attempt(body)
    assert found.outcome in ("timeout", "too much output", "failed")
    assert len(found.output) <= SHORT.output_bytes
    assert time.monotonic() - begun < 4
    while processes() and time.monotonic() - begun < 5:  # the kernel takes a moment to end them
        time.sleep(0.02)
    assert not processes()


LARGE = {
    "takes memory": "return len(bytearray(1 << 30))",
    "takes memory by steps": "x = []\nwhile True:\n    x.append(bytearray(1 << 24))",
    "writes a large file": "open('/tmp/x', 'wb').write(bytes(1 << 24))\nreturn 1",
    "writes many files": "for i in range(100):\n    open(f'/tmp/{i}', 'wb').write(bytes(1 << 19))\nreturn 1",
    "opens many files": "return len([open('/dev/null') for _ in range(1000)])",
    "recurses": "def f():\n    return f()\nreturn f()",
    "makes a huge number": "return len(str(10 ** 10 ** 8))",
}


@pytest.mark.parametrize("body", LARGE.values(), ids=LARGE)
def test_it_gets_no_more_than_its_share(body: str) -> None:
    assert attempt(body).outcome in ("failed", "timeout")


CHEATS = {
    "ends before it is asked": "import os\nos._exit(0)",
    "ends by an exception": "import sys\nsys.exit(0)",
    "prints what looks like an answer": "print('\\n[true]')\nimport os\nos._exit(0)",
    "prints every line of its own program": (
        "import os\nsource = open('/tmp/program.py').read()\nprint(source)\nos._exit(0)"
    ),
    "returns what is no JSON": "return object()",
    "returns a number that is none": "return float('nan') == 0 or object()",
    "closes its output": "import os\nos.close(1)\nreturn True",
}


@pytest.mark.parametrize("body", CHEATS.values(), ids=CHEATS)
def test_only_answers_count(body: str) -> None:
    assert attempt(body).answers == ()


def test_no_folder_is_left() -> None:
    before = set(glob.glob(tempfile.gettempdir() + "/sandbox-*"))
    attempt("return 1")
    attempt("while True: pass")
    assert set(glob.glob(tempfile.gettempdir() + "/sandbox-*")) <= before
