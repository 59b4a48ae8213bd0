"""The two ways in which a worker runs beside its host: as a process of its own, or as a thread of the host's."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol, TypeAlias

import msgspec

from torchship import hardware, process
from torchship.errors import BadConfig, Unavailable
from torchship.serve.engine.ipc.arena import Arena
from torchship.serve.engine.spec import WorkerSpec
from torchship.serve.ipc.output import WorkerOutput
from torchship.serve.ipc.packets import INLINE

_log = logging.getLogger("torchship.serve")
_MAIN = "torchship.serve.engine.worker:main"


class RunningWorker(Protocol):
    """A worker that has been started. It talks over `sock`; `pid` is the process that it is in."""

    pid: int
    sock: socket.socket

    @property
    def size(self) -> int:
        """Resident memory of its own in bytes; 0 where that is not known."""

    @property
    def waited(self) -> float:
        """Seconds that it could have run but had no processor, as far as that is told."""

    def kill(self) -> None:
        """End it now; `on_end` is called as soon as it is gone, or will never be heard again."""

    def unwatch(self) -> None:
        """It is gone: `on_end` needs not be called any more, and its last words are read."""

    def release(self) -> str:
        """Give everything back; how it ended, in words."""

    @property
    def last_lines(self) -> list[str]:
        """What it has printed last, where that is kept apart."""


Launch: TypeAlias = Callable[[WorkerSpec, Arena, Callable[[str], None], Callable[[], None]], RunningWorker]


class WorkerProcess:
    """A worker in a process of its own: it can be killed, its memory is its own, and its crash is nobody else's."""

    def __init__(
        self, spec: WorkerSpec, arena: Arena, on_line: Callable[[str], None], on_end: Callable[[], None]
    ) -> None:
        """Raises OSError when memory, processes or descriptors have run out; then nothing is left behind."""
        self._loop = asyncio.get_running_loop()
        place, seen = spec.placement.alone(os.environ)
        undo: list[Callable[[], None]] = []
        try:
            self._output = WorkerOutput(loop=self._loop, on_line=on_line)
            undo += [self._output.close, lambda: os.close(self._output.inlet)]
            self._child, self.sock = process.converse(
                _MAIN,
                argument=(arena.region.fd, msgspec.structs.replace(spec, placement=place)),
                fds=(arena.region.fd,),
                output=self._output.inlet,
                threads=spec.placement.threads or None,
                cpus=spec.placement.cpus,
                env={"PYTHONUNBUFFERED": "1", hardware.MEMORY_SHARE: str(place.memory_share), **seen},
            )
            undo += [self.sock.close, lambda: process.stop(self._child)]
            self._pidfd = os.pidfd_open(self._child.pid)
        except OSError:
            for step in reversed(undo):
                step()
            raise
        self.pid = self._child.pid
        os.close(self._output.inlet)
        self._loop.add_reader(self._pidfd, on_end)

    @property
    def size(self) -> int:
        try:
            with open(f"/proc/{self.pid}/statm") as file:
                return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            return 0

    @property
    def waited(self) -> float:
        return process.waited_for_processor(self.pid)

    @property
    def last_lines(self) -> list[str]:
        return self._output.last_lines

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def unwatch(self) -> None:
        self._loop.remove_reader(self._pidfd)

    def release(self) -> str:
        self._output.close()
        process.stop(self._child)
        os.close(self._pidfd)
        self.sock.close()
        return process.explain_crash(process.describe_exit(self._child.returncode), self._output.tail)


class WorkerThread:
    """A worker in a thread of the host: one interpreter and one set of libraries less in memory.

    A thread cannot be killed. One that hangs is left to itself, what it ran fails, and no other thread opens the same
    stage before it has come back: so there are never two copies of a model in memory because of it. A crash of
    native code ends the whole server; what the stage prints goes where the server's own output goes.
    """

    _stuck: dict[str, threading.Thread] = {}  # by what they run; those that still live after a kill

    def __init__(
        self, spec: WorkerSpec, arena: Arena, on_line: Callable[[str], None], on_end: Callable[[], None]
    ) -> None:
        """Raises OSError when descriptors have run out, BadConfig for what only a process of its own can have,
        and Unavailable while an earlier thread of this stage hangs."""
        if spec.placement.device != "cpu" or spec.limits.memory:
            what = "a memory limit" if spec.limits.memory else f"the device {spec.placement.device}"
            raise BadConfig(
                f"stage {spec.model.name!r} has {what}, which one process cannot give it",
                hint="leave out one_process, or that setting: a worker that takes too much cannot be replaced",
            )
        self._name = f"{spec.model.name} of {spec.model.config.artifact or spec.model.config.run}"
        if self._name in self.stuck():
            raise Unavailable(
                f"stage {spec.model.name!r} hangs, and a thread cannot be ended",
                hint="restart the server, or give the model a process of its own: leave out one_process",
            )
        self._stuck.pop(self._name, None)
        loop, self.pid = asyncio.get_running_loop(), os.getpid()
        self.size, self.waited, self.last_lines = 0, 0.0, list[str]()  # its own are not told from the host's
        self._on_end, self._watched = on_end, True
        self._loop = loop
        self.sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 * INLINE)
        try:
            fd = os.dup(arena.region.fd)
        except OSError:
            self.sock.close()
            theirs.close()
            raise
        self._thread = threading.Thread(target=self._run, args=(fd, spec, theirs), name=self._name, daemon=True)
        self._thread.start()

    def _run(self, fd: int, spec: WorkerSpec, sock: socket.socket) -> None:
        try:
            with sock:
                if spec.placement.cpus:
                    os.sched_setaffinity(0, spec.placement.cpus)  # of this thread, and those that it starts
                process.resolve(_MAIN)((fd, msgspec.to_builtins(spec)), sock, threaded=True)
        except BaseException as fault:  # a lost device, or whatever else a worker process would end with
            _log.error("the thread of stage %s ends: %s", self._name, fault)
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._ended)

    def _ended(self) -> None:
        if self._watched:
            self._watched = False
            self._on_end()

    @classmethod
    def stuck(cls) -> list[str]:
        """The names of the threads that were given up, and still run."""
        return [name for name, thread in cls._stuck.items() if thread.is_alive()]

    def kill(self) -> None:
        if self._thread.is_alive():
            self._stuck[self._name] = self._thread
        with suppress(OSError):  # when its call returns, it finds nobody to tell, and ends
            self.sock.shutdown(socket.SHUT_RDWR)
        self._loop.call_soon(self._ended)

    def unwatch(self) -> None:
        self._watched = False

    def release(self) -> str:
        self.sock.close()
        return "is left to itself" if self._thread.is_alive() else "its thread ended"
