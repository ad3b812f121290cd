"""Shuts the calling process in and runs a Python program there. `sandbox.py` starts this file.

The process gets its own network (without any device), process numbers, mounts and message queues; a root folder that
holds Python and an empty /tmp in memory; limits of CPU time, memory, files and processes; and a user without rights.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys

_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_libc = ctypes.CDLL(None, use_errno=True)


def _call(function: str, *arguments: bytes | int | None) -> None:
    if getattr(_libc, function)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), f"{function} of the sandbox: {os.strerror(ctypes.get_errno())}")


def _mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    encoded = (None if text is None else os.fsencode(text) for text in (source, target, kind))
    _call("mount", *encoded, ctypes.c_ulong(flags), None if options is None else options.encode())  # pyright: ignore


def _enter_namespaces() -> None:
    spaces = os.CLONE_NEWNET | os.CLONE_NEWPID | os.CLONE_NEWNS | os.CLONE_NEWIPC | os.CLONE_NEWUTS
    user, group = os.getuid(), os.getgid()
    if user == 0:
        os.unshare(spaces)
        return
    os.unshare(spaces | os.CLONE_NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)


def _make_root(root: str, visible: list[str], disk_bytes: int) -> None:
    """Mounts at `root` a tree with the `visible` folders, read-only, and /tmp in memory, and makes it the root."""
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={disk_bytes + 65536},mode=755")
    for folder in visible:
        target = root + folder
        os.makedirs(target, exist_ok=True)
        _mount(folder, target, None, _MS_BIND | _MS_REC)
        _mount("none", target, None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID)
    os.makedirs(root + "/dev", exist_ok=True)
    for device in ("null", "urandom"):
        os.close(os.open(f"{root}/dev/{device}", os.O_CREAT))
        _mount(f"/dev/{device}", f"{root}/dev/{device}", None, _MS_BIND)
    os.mkdir(root + "/tmp")
    os.chmod(root + "/tmp", 0o777)
    os.chroot(root)
    os.chdir("/tmp")


def _limit(limits: dict[str, int]) -> None:
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, value))


def main() -> None:
    order = json.loads(sys.stdin.buffer.readline())
    program = sys.stdin.buffer.read()
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL)
    _enter_namespaces()
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) % 256)
    # The first process of its namespace: when it ends, the kernel kills all that it started.
    os.setsid()
    _make_root(order["root"], order["visible"], order["disk_bytes"])
    with open("/tmp/program.py", "wb") as file:
        file.write(program)
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(order["user"])
        os.setuid(order["user"])
    _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL)  # a change of the user clears it
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    os.umask(0o077)
    _limit(order["limits"])
    os.closerange(3, 256)
    os.execve(order["python"], [order["python"], "-I", "-S", "-B", "/tmp/program.py"], {"LANG": "C.UTF-8"})


if __name__ == "__main__":
    main()
