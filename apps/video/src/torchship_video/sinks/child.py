"""The process of a sink: takes observations from its host, reads their pixels from the ring, writes, and says so."""

from __future__ import annotations

import signal
import socket
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from torchship_video.messages import LARGEST, Frame, Observation
from torchship_video.sinks import Opening, SinkConfig, kind_of

_TELL = 1.0  # seconds between two tellings of facts while nothing is written


class Done(msgspec.Struct, frozen=True, array_like=True):
    """A child's answer to one observation, or, with `what` facts or failed, a word of its own.

    `what`: it was written, or skipped because its pixels were stale. `output` is what the sink gave back.
    """

    what: str
    camera: str = ""
    output: bytes = b""
    facts: dict[str, int] = {}
    words: str = ""


class SinkTask(msgspec.Struct, frozen=True):
    """What a child is told to do."""

    config: SinkConfig
    opening: Opening


def main(argument: Any, talk: socket.socket) -> None:
    """Serve one sink until the host closes the socket. What the sink raises is told, and ends the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    task = msgspec.convert(argument, SinkTask)
    encode, decoder = msgspec.msgpack.encode, msgspec.msgpack.Decoder(Observation)
    try:
        module, options = kind_of(task.config)
        sink = module.SINK(options, task.opening)
        talk.send(encode(Done("opened")))
        told: dict[str, int] = {}
        while True:
            talk.settimeout(_TELL)
            try:
                data = talk.recv(LARGEST)
            except TimeoutError:
                if (facts := sink.facts()) != told:
                    talk.send(encode(Done("facts", facts=facts)))
                    told = facts
                continue
            if not data:
                break
            talk.settimeout(None)
            observation = decoder.decode(data)
            pixels = rgb(observation.frame, options.width) if module.PIXELS else None
            stale = module.PIXELS and pixels is None
            output = None if stale else sink.write(observation, pixels)
            told = sink.facts()
            done = Done("stale" if stale else "written", observation.frame.camera, output or b"", told)
            talk.send(encode(done))
        sink.close()
    except (BrokenPipeError, ConnectionResetError):  # the host is gone, and this process with it
        return
    except Exception as fault:
        words = getattr(fault, "line", "") or f"{type(fault).__name__}: {' '.join(str(fault).split())}"
        try:
            talk.send(encode(Done("failed", words=words[:1000])))
        except OSError:
            pass
        raise SystemExit(1) from None


def rgb(frame: Frame, width: int = 0) -> NDArray[np.uint8] | None:
    """A frame's pixels as RGB of their own, at most `width` wide (0: as they are); None when they are gone."""
    from torchship_video import pixels as conversion  # what writes text alone has no need of it
    from torchship_video import ring

    try:
        with ring.read(frame) as pixels:
            if 0 < width < frame.width:
                size = (width, max(1, round(frame.height * width / frame.width)))
                return conversion.crop(pixels, frame, (0, 0, frame.width, frame.height), size=size)
            return np.array(conversion.to_rgb(pixels, frame))
    except ring.StaleFrame:
        return None
