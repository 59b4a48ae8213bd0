"""Events over a seqpacket socket in an event loop, in both directions: those of one turn of the loop leave together."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from typing import Any

import msgspec

from torchship.serve.ipc.packets import Inbox, send

_EVENTS = 256  # in one message
_encode = msgspec.msgpack.Encoder().encode


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
        except ConnectionError:
            self._end("")
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
                self._end("")
                return
            *events, last = self._decode(message)
            for event in events:
                self._on_event(event, -1)
            self._on_event(last, fd)
        except BlockingIOError:
            return
        except ConnectionError:
            self._end("")
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
