"""What the children of the ring's tests do."""

from __future__ import annotations

import os
import signal
import socket
import time
from typing import Any

from torchship_video import ring
from torchship_video.messages import decode
from torchship_video.ring import RingWriter


def hold_forever(argument: str, line: socket.socket) -> None:
    """Hold every frame that is sent, and say so."""
    while message := line.recv(4096):
        ring.hold(decode(message))
        line.send(b"held")


def write_half(name: str, line: socket.socket) -> None:
    """Take a ring, claim a slot, write a part of it, and never publish."""
    writer = RingWriter.take(name)
    slot = writer.claim()
    assert slot
    slot.pixels(4, 2, "RGB")[0] = 99
    line.send(b"written")
    time.sleep(60)


def die_with_a_ring(argument: Any, line: socket.socket) -> None:
    """A decoder that is killed when it has made its ring, and before its first frame."""
    RingWriter.make(size=64, slots=2, name=f"{argument['ring']}.1")
    os.kill(os.getpid(), signal.SIGKILL)
