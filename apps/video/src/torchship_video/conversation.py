"""A child process and what it says, on the event loop: how the flow talks to its sources and its sinks."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgspec

from torchship import process
from torchship_video.messages import LARGEST


class Conversation:
    """A child that was started by `process.converse`. All methods belong to the event loop's thread.

    `take` is called with each message as it comes, and `quiet`, if given, when all that were there are taken. `ended`
    is set once the child is gone, or has sent what is no message of its kind.
    """

    def __init__(
        self, target: str, argument: object, *, take: Callable[[bytes], None], quiet: Callable[[], None] | None = None
    ) -> None:
        given: Any = msgspec.to_builtins(argument)
        self._child, self._sock = process.converse(target, argument=given, threads=1)
        self._sock.setblocking(False)
        for buffer in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            self._sock.setsockopt(socket.SOL_SOCKET, buffer, LARGEST)
        self._take, self._quiet = take, quiet
        self.ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._sock.fileno(), self._hear)

    @property
    def pid(self) -> int:
        """The child's process."""
        return self._child.pid

    def send(self, message: bytes) -> None:
        """Send one message. Raises BlockingIOError where the child has read too little, OSError where it is gone."""
        self._sock.send(message)

    def finish(self) -> None:
        """Let the child read what was sent, and nothing more: it may end in its own time."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def close(self) -> int:
        """End the child, where it has not ended; its exit code."""
        asyncio.get_running_loop().remove_reader(self._sock.fileno())
        self._sock.close()
        process.stop(self._child)
        return self._child.wait()

    def _hear(self) -> None:
        try:
            while message := self._next():
                self._take(message)
        except BlockingIOError:
            if self._quiet is not None:
                self._quiet()
            return
        except (OSError, msgspec.DecodeError):
            pass
        asyncio.get_running_loop().remove_reader(self._sock.fileno())
        self.ended.set()

    def _next(self) -> bytes:
        """A child that ended with something unread is told once as a reset, before what it has sent."""
        try:
            return self._sock.recv(LARGEST)
        except ConnectionResetError:
            return self._sock.recv(LARGEST)
