"""MOTChallenge text: `frame,number,left,top,width,height,score,-1,-1,-1`, a file a camera, frames counted from 1."""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

from torchship.errors import BadConfig
from torchship_video.messages import Observation
from torchship_video.sinks import Opening
from torchship_video.sinks.files import CameraPaths, LineFile

PIXELS = AGAIN = False


class MotOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`path` is the file, `{camera}` in it the camera's name; it begins anew whenever the application is started.

    Confirmed tracks are written where they were seen; `predicted`: also where they were not, at the predicted place.
    `identities`: the number is the identity across cameras, for tracks that have one.
    """

    path: str
    predicted: bool = False
    identities: bool = False

    def __post_init__(self) -> None:
        if not self.path:
            raise BadConfig("sink motchallenge: it needs a path", hint='options = { path = "{camera}.txt" }')


class MotText:
    """Writes one line a track and frame."""

    def __init__(self, options: MotOptions, opening: Opening) -> None:
        self._options, self._fresh = options, opening.restarts == 0
        self._paths, self._files = CameraPaths(options.path), dict[str, LineFile]()

    def write(self, observation: Observation, _pixels: NDArray[np.uint8] | None) -> None:
        """Append the lines of one frame, all at once."""
        camera = observation.frame.camera
        if camera not in self._files:
            self._files[camera] = LineFile(self._paths(camera), fresh=self._fresh)
        lines = []
        for track in observation.tracks:
            number = track.identity if self._options.identities else track.number
            if number < 1 or not track.confirmed or not (track.seen or self._options.predicted):
                continue
            left, top, right, bottom = track.box
            place = f"{left:.2f},{top:.2f},{right - left:.2f},{bottom - top:.2f}"
            lines.append(f"{observation.frame.sequence + 1},{number},{place},{track.score:.3f},-1,-1,-1\n")
        if lines:
            self._files[camera].write("".join(lines).encode())

    def facts(self) -> dict[str, int]:
        """How many files there are."""
        return {"files": len(self._files)}

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()


OPTIONS, SINK = MotOptions, MotText
