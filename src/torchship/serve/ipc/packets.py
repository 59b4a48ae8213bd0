"""Messages over a private Unix seqpacket socket, each with at most one descriptor.

A message of any size arrives: a large one lies in memory of its own, whose descriptor is sent instead, so that the
socket's buffer never fills up.
"""

from __future__ import annotations

import array
import os
import select
import socket
import time

INLINE = 2**13  # bytes; a batch of 400 jobs. A dozen such messages fit into a socket that nobody reads
_LARGE = b"\xc1"  # the byte that msgpack never begins with: the message lies in the first descriptor
_ROOM = socket.CMSG_SPACE(2 * array.array("i").itemsize)


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
