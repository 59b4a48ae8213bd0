"""What the process tests run in children, and how these end."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import time

import psutil

from torchship.errors import BadInput
from torchship.process import spawn

ENDINGS = [
    ("complain", "bad thing", "bad thing (mend it)"),
    ("crash", None, "killed by SIGSEGV"),
    ("leave", 7, "exited with code 7"),
    ("missing", None, "AttributeError"),
]


def echo(argument: object) -> object:
    return argument


def environment(name: str) -> str | None:
    return os.environ.get(name)


def affinity(_: object) -> list[int]:
    return sorted(os.sched_getaffinity(0))


def complain(text: str) -> None:
    print("last words", file=sys.stderr)
    raise BadInput(text, hint="mend it")


def crash(_: object) -> None:
    ctypes.string_at(0)


def leave(code: int) -> None:
    os._exit(code)


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def eat(size: int) -> int:
    block = bytearray(size)
    block[::4096] = b"x" * len(block[::4096])
    time.sleep(30)
    return len(block)


def parent_of_a_sleeper(pid_file: str) -> None:
    child = spawn(f"{__name__}:sleep", argument=60)
    with open(pid_file, "w") as file:
        file.write(str(child.pid))
    time.sleep(60)


def imported(name: str) -> bool:
    return name in sys.modules


def parents(_: object) -> list[int]:
    return [os.getppid()]


def kill_the_parent(_: object) -> None:
    print(os.getpid(), flush=True)
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)


def gone(pid: int) -> bool:
    """Whether a process ends within seconds; who waits for it is another matter."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def answer_in_capitals(prefix: str, sock: socket.socket) -> None:
    """Answers each message until the other side closes."""
    while message := sock.recv(2**16):
        sock.send(prefix.encode() + message.upper())
