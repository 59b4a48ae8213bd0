"""Messages over a private Unix seqpacket socket, each with at most one descriptor.

A message of any size arrives: a large one lies in memory of its own, whose descriptor is sent instead, so that the
socket's buffer never fills up.
"""

from __future__ import annotations

import array
import asyncio
import os
import select
import socket
import time
from collections.abc import Callable
from typing import Any

import msgspec

INLINE = 2**13  # bytes; a batch of 400 jobs. A dozen such messages fit into a socket that nobody reads
_LARGE = b"\xc1"  # the byte that msgpack never begins with: the message lies in the first descriptor
_ROOM = socket.CMSG_SPACE(2 * array.array("i").itemsize)
_EVENTS = 256  # in one message of a Channel
_encode = msgspec.msgpack.Encoder().encode


def send(sock: socket.socket, message: bytes, *, fd: int = -1) -> None:
    """Send one message, and a descriptor with it. Raises OSError."""
    fds = [] if fd < 0 else [fd]
    if len(message) > INLINE:
        with os.fdopen(os.memfd_create("torchship-message", os.MFD_CLOEXEC), "wb") as file:
            file.write(message)
            file.flush()
            socket.send_fds(sock, [_LARGE], [file.fileno(), *fds])
    elif fds:
        socket.send_fds(sock, [message], fds)
    else:
        sock.send(message)


class Inbox:
    """Reads messages into one buffer that is made once: a fresh one of this size for each message costs 15 µs."""

    def __init__(self, sock: socket.socket) -> None:
        self._receive = sock.recvmsg_into
        self._buffer = bytearray(INLINE)
        self._into = [self._buffer]
        self._view = memoryview(self._buffer)
        watch = select.poll()
        watch.register(sock, select.POLLIN)
        self._poll = watch.poll

    @property
    def waiting(self) -> bool:
        """Whether there is something to read."""
        return bool(self._poll(0))

    def next(self, *, patience: int = 0) -> tuple[memoryview, int]:
        """One message, valid until the next, and the descriptor that came with it, or -1.

        For `patience` nanoseconds it looks again and again, which is quicker than to be woken; others may use the
        core meanwhile. An empty message: the other side is gone. Raises OSError.
        """
        if patience:
            poll, until = self._poll, time.monotonic_ns() + patience
            while not poll(0) and time.monotonic_ns() < until:
                os.sched_yield()
        size, extra, flags, _ = self._receive(self._into, _ROOM, socket.MSG_CMSG_CLOEXEC)
        message = self._view[:size]
        if not extra:
            return message, -1
        fds = _descriptors(extra, flags)
        if message == _LARGE:
            with os.fdopen(fds.pop(0), "rb") as file:
                file.seek(0)
                message = memoryview(file.read())
        if len(fds) > 1:
            for fd in fds:
                os.close(fd)
            raise OSError("a message came with more than one descriptor")
        return message, fds[0] if fds else -1


def _descriptors(extra: list[tuple[int, int, bytes]], flags: int) -> list[int]:
    fds = array.array("i")
    for level, kind, data in extra:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    if flags & socket.MSG_CTRUNC or not fds:
        for fd in fds:
            os.close(fd)
        raise OSError("a message came with more descriptors than it may, or this process has no room for them")
    return list(fds)


class Channel:
    """One end of a socket in an event loop: what is posted within one turn of the loop leaves in few messages.

    `on_event` gets each event and the descriptor that came with it (or -1); `on_end` why nothing more will come.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        decode: Callable[[memoryview], list[Any]],
        on_event: Callable[[Any, int], None],
        on_end: Callable[[str], None],
    ) -> None:
        self._sock, self._inbox = sock, Inbox(sock)
        self._decode, self._on_event, self._on_end = decode, on_event, on_end
        self._loop = asyncio.get_running_loop()
        self._out: list[tuple[Any, int]] = []
        self._due = False
        sock.setblocking(False)
        self._loop.add_reader(sock.fileno(), self._hear)

    def post(self, event: Any, fd: int = -1) -> None:
        """Send an event at the end of this turn; a descriptor that goes with it is closed here afterwards."""
        if self._sock.fileno() < 0:
            if fd >= 0:
                os.close(fd)
            return
        self._out.append((event, fd))
        if not self._due:
            self._due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        out = self._out
        try:
            while out:
                end = 1
                while end < min(len(out), _EVENTS) and out[end - 1][1] < 0:
                    end += 1
                fd = out[end - 1][1]
                send(self._sock, _encode([event for event, _ in out[:end]]), fd=fd)
                del out[:end]
                if fd >= 0:
                    os.close(fd)
            self._due = False
        except BlockingIOError:  # the other side is behind
            self._loop.add_writer(self._sock.fileno(), self._go_on)
        except OSError as fault:
            self._end(f"cannot be told anything: {fault}")

    def _go_on(self) -> None:
        self._loop.remove_writer(self._sock.fileno())
        self._flush()

    def _hear(self) -> None:
        """Read one message; the loop calls again while there are more."""
        try:
            message, fd = self._inbox.next()
            if not message:
                self._end("is gone")
                return
            *events, last = self._decode(message)
            for event in events:
                self._on_event(event, -1)
            self._on_event(last, fd)
        except BlockingIOError:
            return
        except Exception as fault:  # whatever the other side sent, we go on
            self._end(f"broke the protocol: {fault}")

    def _end(self, why: str) -> None:
        self.close()
        self._on_end(why)

    def close(self) -> None:
        """Send and read nothing more; may be called twice."""
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock.fileno())
            self._loop.remove_writer(self._sock.fileno())
            self._sock.close()
        for _, fd in self._out:
            if fd >= 0:
                os.close(fd)
        self._out.clear()
        self._due = True
