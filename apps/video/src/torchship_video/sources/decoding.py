"""The process of a source: opens it with PyAV, decodes into a ring of shared memory, and sends handles to its host.

Kinds are told apart by their address: rtsp://, http:// (MJPEG and what else FFmpeg plays), /dev/video0, a folder of
pictures, a file. A live source that ends has lost its connection; a file or folder that ends is at its end.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import msgspec
import numpy as np
from av.video.reformatter import ColorRange, VideoReformatter

from torchship.errors import TorchshipError, Unavailable
from torchship.stages.picture import picture_files
from torchship_video import ring
from torchship_video.messages import Frame, Layout
from torchship_video.pixels import pixel_bytes, planes
from torchship_video.ring import RingWriter
from torchship_video.sources import is_live, kind_of

_LAYOUTS: dict[str, Layout] = {"yuv420p": "I420", "nv12": "NV12", "rgb24": "RGB"}
_OPENING = 10.0  # seconds to connect, and to wait for data; the host looks at the age of frames beside that
_PICTURES_A_SECOND = 25.0
_reformatter = VideoReformatter()  # keeps its tables from frame to frame


class SourceTask(msgspec.Struct, frozen=True, kw_only=True):
    """What to decode. `wait`: nothing is dropped, the decoder waits for room. `realtime`: as fast as it was filmed.

    `first` is the number of the first frame: a file goes on behind those that were sent before its process was lost.
    `slots` is how many frames a ring has room for, `ring` what their names begin with: the host removes them.
    """

    camera: str
    source: str
    wait: bool = False
    realtime: bool = False
    loop: bool = False
    transport: str = "tcp"
    options: dict[str, Any] = {}
    first: int = 0
    slots: int = ring.SLOTS
    ring: str


class SourceTold(msgspec.Struct, frozen=True, array_like=True):
    """A word of the child: `frame` with a handle, `opened`, `end`, or with `words` `failed` or `broken` (one picture).

    `lost` counts frames so far.
    """

    what: str
    frame: Frame | None = None
    words: str = ""
    lost: int = 0


def main(argument: Any, talk: socket.socket) -> None:
    """Decode until the source ends or the host is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    task = msgspec.convert(argument, SourceTask)
    decoder = _Decoder(task, talk)
    try:
        decoder.run()
        decoder.tell(SourceTold("end", lost=decoder.lost))
    except (BrokenPipeError, ConnectionResetError):
        return
    except av.error.FFmpegError as fault:
        decoder.tell(SourceTold("failed", words=fault.strerror or type(fault).__name__))
    except (TorchshipError, OSError) as fault:
        decoder.tell(SourceTold("failed", words=getattr(fault, "line", "") or str(fault)))


class _Decoder:
    """A source while it is decoded."""

    def __init__(self, task: SourceTask, talk: socket.socket) -> None:
        self._task, self._talk = task, talk
        self._writer: RingWriter | None = None
        self._rings = 0
        self._flying: deque[Frame] = deque()  # held until the host says that it holds them
        self._sequence = task.first
        self._paused = False
        self.lost = 0

    def tell(self, told: SourceTold) -> None:
        """Send a word to the host."""
        self._talk.send(msgspec.msgpack.encode(told))

    def run(self) -> None:
        """Decode all, again and again where it loops."""
        offset, known = 0.0, 0 if is_live(self._task.source) or self._task.loop else self._task.first
        while True:
            began, last = time.monotonic(), 0.0
            seen = False
            for decoded, position in _frames(self._task, self._broken):
                if not seen:
                    self.tell(SourceTold("opened"))
                    seen = True
                last = position
                if known:  # of before the process was lost
                    known -= 1
                    continue
                if self._task.realtime and (early := began + position - time.monotonic()) > 0:
                    self._listen(early)
                stopped = time.monotonic()
                while self._paused:
                    self._listen(None)
                began += time.monotonic() - stopped
                self._publish(decoded, offset + position)
            if not seen:
                raise Unavailable("it holds no frames", hint="is it a video?")
            if not self._task.loop:
                return
            offset += last + 1 / _PICTURES_A_SECOND

    def _broken(self, words: str) -> None:
        self.lost += 1
        self.tell(SourceTold("broken", words=words, lost=self.lost))

    def _publish(self, decoded: Any, position: float) -> None:
        layout = _LAYOUTS.get(decoded.format.name, "I420")
        width, height = decoded.width, decoded.height
        if width % 2 or height % 2:
            layout = "RGB"
        size = pixel_bytes(width, height, layout)
        if self._writer is None or size > self._writer.size:
            if self._writer is not None:
                self._writer.close(remove=False)  # the host removes it when nothing of it is needed
            self._rings += 1
            self._writer = RingWriter.make(size=size, slots=self._task.slots, name=f"{self._task.ring}.{self._rings}")
        self._listen(0)
        slot = self._writer.claim()
        while slot is None and self._task.wait:
            self._listen(0.005)
            slot = self._writer.claim()
        number, self._sequence = self._sequence, self._sequence + 1
        if slot is None:
            self.lost += 1
            return
        _copy(decoded, slot.pixels(width, height, layout), width, height, layout)
        frame = slot.publish(self._task.camera, sequence=number, position=position)
        ring.hold(frame)
        self._flying.append(frame)
        self.tell(SourceTold("frame", frame, lost=self.lost))

    def _listen(self, seconds: float | None) -> None:
        """Hear what the host says, for so long, None: until it says something."""
        end = None if seconds is None else time.monotonic() + seconds
        while True:
            left = None if end is None else max(0.0, end - time.monotonic())
            if not select.select([self._talk], [], [], left)[0]:
                return
            word = self._talk.recv(64)
            if not word:
                os._exit(0)  # the host has closed the line
            if word == b"pause":
                self._paused = True
            elif word == b"resume":
                self._paused = False
            elif self._flying:
                ring.release(self._flying.popleft())
            if end is None:
                return


def _frames(task: SourceTask, on_broken: Callable[[str], None]) -> Iterator[tuple[Any, float]]:
    """Decoded frames and their seconds in the stream; what is wrong with a picture of a folder is told and left out."""
    kind = kind_of(task.source)
    if kind == "pictures":
        for number, path in enumerate(picture_files(Path(task.source))):
            try:
                with av.open(f"file:{path}") as container:
                    decoded = next(container.decode(video=0), None)
            except (av.error.FFmpegError, IndexError) as fault:
                on_broken(f"{path.name}: {getattr(fault, 'strerror', '') or 'it is no picture'}")
                continue
            if decoded is not None:
                yield decoded, number / _PICTURES_A_SECOND
        return
    options = {str(key): str(value) for key, value in task.options.items()}
    if kind == "rtsp":
        options = {"rtsp_transport": task.transport, "fflags": "nobuffer"} | options
    driver = "v4l2" if kind == "v4l2" else None
    timeout = (_OPENING, _OPENING) if is_live(task.source) else None
    began, start = time.monotonic(), 0.0
    source = f"file:{task.source}" if kind == "file" else task.source  # concat: and the like are no names of files
    with av.open(source, options=options, timeout=timeout, format=driver) as container:
        if not container.streams.video:
            raise Unavailable("it holds no video", hint="is it a video?")
        stream = container.streams.video[0]
        stream.thread_count = 1
        for number, decoded in enumerate(container.decode(stream)):
            seconds: float | None = decoded.time if decoded.pts is not None else None
            if seconds is None:
                rate = float(stream.average_rate or _PICTURES_A_SECOND)
                seconds = time.monotonic() - began if is_live(task.source) else number / rate
            start = start if number else seconds
            yield decoded, max(0.0, seconds - start)


def _copy(decoded: Any, pixels: Any, width: int, height: int, layout: Layout) -> None:
    """A decoded frame into a slot, converted where its own layout or its range of values is another.

    Frames in a ring have limited range (`pixels`), those of JPEG and of many USB cameras have full range.
    """
    name = {"I420": "yuv420p", "NV12": "nv12", "RGB": "rgb24"}[layout]
    full = decoded.format.name.startswith("yuvj") or (layout != "RGB" and decoded.color_range == ColorRange.JPEG)
    if full and layout != "RGB":
        decoded = _reformatter.reformat(decoded, format=name, src_color_range="JPEG", dst_color_range="MPEG", threads=1)
    elif decoded.format.name != name:
        decoded = _reformatter.reformat(decoded, format=name, threads=1)
    if layout == "RGB":
        rows = np.frombuffer(decoded.planes[0], np.uint8).reshape(height, -1)
        pixels[:] = rows[:, : width * 3].reshape(height, width, 3)
        return
    for into, plane in zip(planes(pixels, width, height, layout), decoded.planes, strict=True):
        rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: into.shape[0]]
        flat = into.reshape(into.shape[0], -1)
        flat[:] = rows[:, : flat.shape[1]]
