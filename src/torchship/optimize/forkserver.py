"""Builds start in no time: they are forked from a process that has imported the heavy libraries once for all.

That process does nothing but import, so there are neither busy threads nor device contexts for a fork to break.
Whatever becomes of a child stays with the child, as it does for one that starts fresh.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import select
import signal
import socket
import subprocess
from collections.abc import Sequence
from typing import Any

from torchship import home, process
from torchship.process import Child, Outcome

_PATIENCE = 120.0  # seconds for the imports; then children start fresh, one by one


class Forkserver:
    """Runs `module:function(argument)` in forked children, one at a time. It imports from its `start` on, which needs
    no waiting for; without one, when it is first needed."""

    def __init__(self, imports: Sequence[str], *, threads: int) -> None:
        home.name_user()  # torch's compiler runs in the children and asks
        self._imports = tuple(imports)
        self._threads = threads
        self._server: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def start(self) -> None:
        """Begin with the imports."""
        if self._control is None:
            self._server, self._control = process.converse(
                "torchship.optimize.forkserver:serve_forks",
                argument=self._imports,
                output=subprocess.DEVNULL,
                threads=self._threads,
            )

    def run(self, target: str, *, argument: object, timeout: float, memory: int | None = None) -> Outcome:
        """What `process.run` does."""

        def start(log: int, answer: int) -> Child:
            try:
                return self._fork(target, argument, log, answer)
            except OSError:  # the server is gone, or its imports hang
                self.close()
                return process.spawn(target, argument=argument, output=log, answer=answer, threads=self._threads)
            except BaseException:
                self.close()
                raise

        return process.watched(start, timeout=timeout, memory=memory)

    def close(self) -> None:
        """End the server, and with it what it forked."""
        if self._control is not None:
            self._control.close()
        if self._server is not None:
            process.stop(self._server)
        self._control = self._server = None

    def _fork(self, target: str, argument: object, log: int, answer: int) -> Child:
        self.start()
        assert self._control is not None  # noqa: S101  # it was started
        ours, theirs = os.pipe()
        given = process.task(target, argument=argument)
        try:
            socket.send_fds(self._control, [b"fork"], [given, log, answer, theirs])
        finally:
            os.close(theirs)
            os.close(given)
        return _Forked(ours)


class _Forked:
    """A child as its status pipe tells of it: the process number once it runs, the exit code once it has ended."""

    def __init__(self, status: int) -> None:
        self._code: int | None = None
        self._status = status
        try:
            self.pid = self._read(_PATIENCE)
        except BaseException:
            os.close(status)
            raise

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        return self._end(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once there is one. Raises subprocess.TimeoutExpired."""
        code = self._end(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
        return code

    def _end(self, seconds: float | None) -> int | None:
        if self._code is None:
            try:
                self._code = self._read(seconds)
            except TimeoutError:
                return None
            except ConnectionError:  # the server died, and took it along
                self._code = -signal.SIGKILL
            os.close(self._status)
        return self._code

    def _read(self, seconds: float | None) -> int:
        if not select.select([self._status], [], [], seconds)[0]:
            raise TimeoutError
        found = os.read(self._status, 8)
        if not found:
            raise ConnectionError
        return int.from_bytes(found, "little", signed=True)


def serve_forks(imports: Any, control: socket.socket) -> None:
    """The server's side: import, then fork whenever asked to, until the other end of the control socket is closed."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for a card must not start CUDA before a fork
    for name in imports:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what is never collected is never copied
    server = os.getpid()
    while True:
        asked, fds, _, _ = socket.recv_fds(control, 16, 4)
        if not asked:
            return
        given, log, answer, status = fds
        child = os.fork()
        if child == 0:
            control.close()
            os.setsid()
            os.dup2(log, 1)
            os.dup2(log, 2)
            _tell(status, os.getpid())
            os.close(status)
            process.perform(given, parent=server, answer=answer)
        _, code = os.waitpid(child, 0)
        with contextlib.suppress(BrokenPipeError):
            _tell(status, os.waitstatus_to_exitcode(code))
        for descriptor in fds:
            os.close(descriptor)


def _tell(status: int, number: int) -> None:
    os.write(status, number.to_bytes(8, "little", signed=True))
