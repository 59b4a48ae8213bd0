"""A recording as a camera: a process decodes it into a ring, as fast as its frames are let go, or in real time."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal, TypeAlias

import msgspec

from torchship import process
from torchship.errors import TorchshipError
from torchship_video.config import CameraConfig
from torchship_video.messages import Frame, decode, encode
from torchship_video.pixels import pixel_bytes, planes, rows_of
from torchship_video.ring import RingWriter, discard

_log = logging.getLogger("torchship.video")
_END, _LOST, _FREE = b"end", b"lost", b"free"
_SPARE = 6  # slots
_PAUSE = 0.5  # seconds before a decoder that died is started again
_TRIES = 5  # starts without one frame
State: TypeAlias = Literal["opening", "live", "stalled", "reconnecting", "ended", "paused", "failed"]


class Recording:
    """The feed of a camera whose source is a file. A decoder that dies is started again, from the beginning.

    The decoder has only so many frames out until they are released; the ring has slots beyond them, for those who hold
    a frame longer, such as the embedder.
    """

    def __init__(self, config: CameraConfig, on_frame: Callable[[Frame], None]) -> None:
        self._config, self._on_frame = config, on_frame
        self.state: State = "opening"
        self.words, self.starts = "", 0
        self.child: Any = None
        self._sock: socket.socket | None = None
        self._owed = 0  # releases that a pause holds back
        self._paused = False
        self._ring = ""

    async def run(self) -> None:
        """Decode until cancelled; after the end of the file the ring is kept until then."""
        idle = 0
        try:
            while self.state not in ("ended", "failed"):
                self.starts, before = self.starts + 1, self._ring
                await self._decode()
                idle = 0 if self._ring != before else idle + 1
                if self.state not in ("ended", "failed"):
                    self.state, self.words = "reconnecting", f"the decoder {process.describe_exit(self.child.wait())}"
                    _log.warning("camera %s: %s", self._config.name, self.words)
                    if idle >= _TRIES:
                        self.state = "failed"
                    await asyncio.sleep(_PAUSE)
            await asyncio.Event().wait()
        finally:
            self._stop()

    async def _decode(self) -> None:
        """One life of the decoder."""
        loop = asyncio.get_running_loop()
        argument = msgspec.to_builtins(self._config)
        self._stop()
        self.child, self._sock = process.converse("torchship_video.recording:main", argument=argument, threads=1)
        self._sock.setblocking(False)
        with suppress(ConnectionError):
            while data := await loop.sock_recv(self._sock, 1 << 16):
                if data == _END:
                    self.state, self.words = "ended", ""
                    return
                if data.startswith(b"fault:"):
                    self.state, self.words = "failed", data[6:].decode()
                    return
                if data == _LOST:
                    self._let_on()
                    continue
                frame = decode(data)
                self._ring = frame.ring
                self.state, self.words = ("paused" if self._paused else "live"), ""
                self._on_frame(frame)

    def release(self, frame: Frame) -> None:
        """A frame is not needed any more."""
        if frame.ring == self._ring:
            self._let_on()

    def pause(self) -> None:
        """Decode no more than the ring holds."""
        self._paused = True
        self.state = "paused" if self.state in ("opening", "live") else self.state

    def resume(self) -> None:
        """Go on."""
        self._paused = False
        self.state = "live" if self.state == "paused" else self.state
        for _ in range(self._owed):
            self._send(_FREE)
        self._owed = 0

    def _let_on(self) -> None:
        if self._paused:
            self._owed += 1
        else:
            self._send(_FREE)

    def _send(self, message: bytes) -> None:
        with suppress(OSError):
            if self._sock is not None:
                self._sock.send(message)

    def _stop(self) -> None:
        if self._sock is not None:
            self._sock.close()
            process.stop(self.child)
            discard(self._ring)
            self._sock, self._owed = None, 0


def main(argument: dict[str, Any], sock: socket.socket) -> None:
    """The decoder's side."""
    import av

    config = msgspec.convert(argument, CameraConfig)
    try:
        _decode(config, sock)
    except (av.error.FFmpegError, TorchshipError, IndexError) as fault:
        sock.send(b"fault:" + f"{type(fault).__name__}: {fault}".encode()[:500])
    else:
        sock.send(_END)
    while sock.recv(16):  # the ring lives as long as its writer
        pass


def _decode(config: CameraConfig, sock: socket.socket) -> None:
    import av

    ring: RingWriter | None = None
    sequence, began, offset = 0, time.monotonic(), 0.0
    with av.open(config.source) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = int(config.options.get("threads", 1))
        step = 1 / float(stream.average_rate or 25)
        while True:
            position = offset
            for picture in container.decode(video=0):
                width, height = picture.width & ~1, picture.height & ~1
                if picture.format.name not in ("yuv420p", "yuvj420p"):
                    picture = picture.reformat(width, height, "yuv420p")  # noqa: PLW2901
                if ring is None or ring.size < pixel_bytes(width, height, "I420"):
                    room = config.queue + config.in_flight + 2
                    ring = RingWriter.make(size=pixel_bytes(width, height, "I420"), slots=room + _SPARE)
                if not room:
                    sock.recv(16)
                    room = 1
                position = offset + (picture.time or 0.0)
                if config.realtime:
                    time.sleep(max(0.0, began + position - time.monotonic()))
                while (slot := ring.claim()) is None and not config.live:
                    time.sleep(0.001)
                if slot is None:
                    sock.send(_LOST)
                else:
                    into = planes(slot.pixels(width, height, "I420"), width, height, "I420")
                    for plane, to in zip(picture.planes, into, strict=True):
                        to[:] = rows_of(plane)[: to.shape[0], : to.shape[1]]
                    sock.send(encode(slot.publish(config.name, sequence=sequence, position=position)))
                room -= 1
                sequence += 1
            if not config.loop:
                return
            offset = position + step
            container.seek(0)
