"""What the parts of the video application tell one another: plain data, sent as MessagePack.

A `Frame` is a handle: it names pixels in a ring of shared memory and never holds them. It travels through a line of the
engine as the tensor `frame`, BYTES of shape [rows, 1]; the stages that need pixels read them in place. An
`Observation` is all that is known about one analysed frame; it is what sinks are given.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

Layout: TypeAlias = Literal["I420", "NV12", "RGB"]
LARGEST = 1 << 20  # bytes of one message between two processes
Box: TypeAlias = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels of the frame; the right and bottom edges are outside."""


class Frame(msgspec.Struct, frozen=True, array_like=True):
    """A handle of one decoded frame.

    `ring` is the name of the ring's shared memory, `slot` a slot of it, `generation` what the slot counts at while it
    holds this frame: once the slot is written again, the handle is stale and reading it raises StaleFrame.
    `sequence` counts the frames that the source decoded, from 0: what is missing was dropped. `taken` is the wall clock
    in Unix seconds when the frame was there, `position` the seconds in the stream's own time.
    """

    camera: str
    ring: str
    slot: int
    generation: int
    sequence: int
    taken: float
    position: float
    width: int
    height: int
    layout: Layout


class Detection(msgspec.Struct, frozen=True, array_like=True):
    """One thing on one frame."""

    box: Box
    score: float
    label: str


class Track(msgspec.Struct, frozen=True, array_like=True):
    """One thing that is followed on one camera.

    `number` is the track's own, from 1, and counts on one camera. `confirmed`: it was seen often enough to be counted.
    `seen`: it was detected on this very frame, else its box is predicted. `identity` is who it is across all cameras, 0
    while that is not known; `ambiguous`: two identities fit about equally well.
    """

    number: int
    box: Box
    score: float
    label: str
    confirmed: bool
    seen: bool = True
    identity: int = 0
    ambiguous: bool = False


class Event(msgspec.Struct, frozen=True, array_like=True):
    """A confirmed track crossed a line, entered or left a zone: `kind` is in, out, enter, leave or dwell.

    `seconds` is how long it had been in the zone, for leave and dwell.
    """

    kind: Literal["in", "out", "enter", "leave", "dwell"]
    where: str
    track: int
    identity: int = 0
    seconds: float = 0.0


class Observation(msgspec.Struct, frozen=True):
    """What is known about one frame: its tracks, and what happened between it and the one before."""

    frame: Frame
    tracks: tuple[Track, ...] = ()
    events: tuple[Event, ...] = ()


class CameraStatus(msgspec.Struct, frozen=True):
    """How a camera is doing.

    `fps` is how many frames a second were analysed of late; `age_p50_ms` and `age_p99_ms` are how old they were when
    their observation was there. `frames` counts those analysed, `drops` those decoded and not analysed. `words` says
    why, where the state alone does not.
    """

    camera: str
    state: Literal["opening", "live", "stalled", "reconnecting", "ended", "paused", "failed"] = "opening"
    words: str = ""
    fps: float = 0.0
    age_p50_ms: float = 0.0
    age_p99_ms: float = 0.0
    frames: int = 0
    drops: int = 0
    tracks: int = 0


def encode(frame: Frame) -> bytes:
    """A frame's handle as an element of a BYTES tensor."""
    return msgspec.msgpack.encode(frame)


def decode(data: bytes) -> Frame:
    """The handle of `encode`. Raises msgspec.ValidationError for anything else."""
    return msgspec.msgpack.decode(data, type=Frame)
