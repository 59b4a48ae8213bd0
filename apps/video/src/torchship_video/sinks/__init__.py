"""Where observations go: one module a kind of sink, each run in a process of its own and fed by a bounded queue.

A module `torchship_video.sinks.KIND` states facts: `OPTIONS`, the struct of its options; `SINK`, a class that is called
with them and with `Opening`; `PIXELS`, whether it wants the frames' pixels, at most as wide as its option `width` says;
`AGAIN`, whether it may be given an observation twice, so that those it held when it died are given to the next one.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from torchship.errors import BadConfig
from torchship_video.messages import Observation
from torchship_video.zones import LineConfig, ZoneConfig

KINDS = ("jsonl", "mjpeg", "motchallenge", "mp4", "mqtt", "webhook")
QUEUE, QUEUE_OF_PIXELS = 1024, 8  # pixels are gone soon, so that a long queue of them holds stale ones


class SinkConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[[sink]]`: `kind` is a module of this package, `options` are that sink's own.

    `queue` is how many observations wait for it at most, 0 for 1024 (8 where it draws pixels); then the oldest is
    dropped and counted. An empty `camera` means every camera.
    """

    kind: str
    name: str = ""
    camera: str = ""
    queue: int = 0
    options: dict[str, Any] = {}


class Opening(msgspec.Struct, frozen=True, kw_only=True):
    """What a sink is told when it opens: how often it was restarted, and what to draw beside the tracks."""

    restarts: int = 0
    zones: tuple[ZoneConfig, ...] = ()
    lines: tuple[LineConfig, ...] = ()


class ObservationSink(Protocol):
    """Somewhere that observations go; all methods are called by one thread of the sink's own process."""

    def write(self, observation: Observation, pixels: NDArray[np.uint8] | None) -> bytes | None:
        """Take one observation, with the RGB pixels of its frame if the module wants PIXELS; what is returned goes
        back to the host. An exception ends the process, which is started again."""

    def facts(self) -> dict[str, int]:
        """Counts of the sink's own, for its status."""

    def close(self) -> None:
        """Finish; nothing is written any more."""


def kind_of(config: SinkConfig) -> tuple[Any, Any]:
    """The module of a sink's kind, and its options, checked. Raises BadConfig."""
    if config.kind not in KINDS:
        raise BadConfig(f"sink.kind: there is no sink {config.kind!r}", hint=f"kinds are {', '.join(KINDS)}")
    if not 0 <= config.queue <= 1 << 20:
        raise BadConfig(f"sink {config.kind}: queue is {config.queue}", hint="from 1 to 1048576, or 0 for the default")
    module = import_module(f"torchship_video.sinks.{config.kind}")
    try:
        return module, msgspec.convert(config.options, module.OPTIONS)
    except msgspec.ValidationError as fault:
        known = ", ".join(module.OPTIONS.__struct_fields__)
        raise BadConfig(f"sink {config.kind}: options: {fault}", hint=f"its options are {known}") from None


def record(observation: Observation) -> dict[str, Any]:
    """An observation as plain data with names, as it is written to files and sent to others."""
    frame = observation.frame
    return {
        "camera": frame.camera,
        "sequence": frame.sequence,
        "taken": round(frame.taken, 3),
        "position": round(frame.position, 3),
        "width": frame.width,
        "height": frame.height,
        "tracks": [
            {
                "number": track.number,
                "box": [round(value, 1) for value in track.box],
                "score": round(track.score, 3),
                "label": track.label,
                "confirmed": track.confirmed,
                "seen": track.seen,
                "identity": track.identity,
                "ambiguous": track.ambiguous,
            }
            for track in observation.tracks
        ],
        "events": [{name: getattr(event, name) for name in event.__struct_fields__} for event in observation.events],
    }
