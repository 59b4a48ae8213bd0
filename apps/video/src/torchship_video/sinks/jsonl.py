"""JSON Lines: one object an observation, appended to a file; a full file is set aside."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from torchship.errors import BadConfig
from torchship_video.messages import Observation
from torchship_video.sinks import Opening, record
from torchship_video.sinks.files import LineFile

PIXELS = AGAIN = False


class JsonLinesOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`path` is the file, `-` the terminal; at `max_mb` it becomes `path.1`, and `keep` old ones are kept.

    `events`: only observations in which something happened. `empty`: those without tracks and events as well.
    """

    path: str
    max_mb: float = 64.0
    keep: int = 5
    events: bool = False
    empty: bool = False

    def __post_init__(self) -> None:
        if not self.path or self.max_mb < 0 or not 0 <= self.keep <= 1000:
            raise BadConfig("sink jsonl: it needs a path, max_mb of 0 or more, keep from 0 to 1000")


class JsonLines:
    """Writes one line an observation."""

    def __init__(self, options: JsonLinesOptions, _opening: Opening) -> None:
        self._options = options
        if options.path == "-":
            self._file = LineFile(Path("/dev/stdout"))
        else:
            path = Path(options.path).expanduser()
            self._file = LineFile(path, limit=int(options.max_mb * 2**20), keep=options.keep)

    def write(self, observation: Observation, _pixels: NDArray[np.uint8] | None) -> None:
        """Append a line, unless nothing is to be told."""
        if observation.events or (not self._options.events and (observation.tracks or self._options.empty)):
            self._file.write(msgspec.json.encode(record(observation)) + b"\n")

    def facts(self) -> dict[str, int]:
        """Nothing of its own."""
        return {}

    def close(self) -> None:
        """Close the file."""
        self._file.close()


OPTIONS, SINK = JsonLinesOptions, JsonLines
