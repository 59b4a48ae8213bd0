"""How long it takes from one camera to the next, learned from what was matched; nothing is calibrated.

For each ordered pair of cameras the last travel times are kept, and their density is that of a kernel on the signed
logarithm of seconds: short ways are told apart finely, long ones coarsely, and cameras that see the same place have
times below zero. A pair that was never travelled says nothing.
"""

from __future__ import annotations

from collections import deque

import msgspec
import numpy as np
from numpy.typing import NDArray

from torchship_video.identity.visits import Visit

_KEPT = 256
_MOST_PAIRS = 4096
_WIDTH = 0.25  # of the kernel, in the logarithm of seconds
_DOUBT = 4.0  # how many travels it takes to count as much as knowing nothing
_SCALE = 3.0


class Learned(msgspec.Struct, frozen=True):
    """What is known of one way: how often it was travelled, and the seconds at the 10th, 50th and 90th percentile."""

    from_camera: str
    to_camera: str
    count: int
    p10: float
    p50: float
    p90: float


class TravelTimes:
    """The travel times of all pairs of cameras."""

    def __init__(self, *, window: float) -> None:
        self._reach = float(np.log1p(window))
        self._times: dict[tuple[str, str], deque[float]] = {}

    def learn(self, start: str, end: str, seconds: float) -> None:
        """Somebody was at camera `end` `seconds` after having been at `start`."""
        pair = start, end
        if pair not in self._times and len(self._times) >= _MOST_PAIRS:
            return
        self._times.setdefault(pair, deque(maxlen=_KEPT)).append(float(seconds))

    def favour(self, start: str, end: str, seconds: float) -> float:
        """From -1 (unlike all that was seen) over 0 (nothing is known) to 1 (just as others did)."""
        known = self._times.get((start, end))
        if not known:
            return 0.0
        distance = (_logarithm(np.array(known)) - _logarithm(np.array(seconds))) / _WIDTH
        density = float(np.exp(-0.5 * distance**2).sum()) / (_WIDTH * np.sqrt(2 * np.pi))
        even = 1 / (2 * self._reach)
        ratio = (density + _DOUBT * even) / ((len(known) + _DOUBT) * even)
        return float(np.clip(np.log(ratio) / _SCALE, -1, 1))

    def forget_camera(self, camera: str) -> None:
        """Drop what was learned about a camera: it was moved."""
        self._times = {pair: times for pair, times in self._times.items() if camera not in pair}

    def table(self) -> list[Learned]:
        """All ways that were travelled."""
        return [
            Learned(start, end, len(times), *(round(float(p), 2) for p in np.percentile(list(times), (10, 50, 90))))
            for (start, end), times in sorted(self._times.items())
        ]

    def dump(self) -> list[tuple[str, str, list[float]]]:
        """All of it as plain data, for `load`."""
        return [(start, end, list(times)) for (start, end), times in self._times.items()]

    def load(self, saved: list[tuple[str, str, list[float]]]) -> None:
        """Take what `dump` gave."""
        self._times = {(start, end): deque(times, _KEPT) for start, end, times in saved[:_MOST_PAIRS]}


def way(one: Visit, other: Visit) -> tuple[str, str, float]:
    """From the earlier of two visits to the later: the cameras, and the seconds from leaving to arriving."""
    early, late = sorted((one, other), key=lambda visit: (visit.first, visit.last, visit.camera))
    return early.camera, late.camera, late.first - early.last


def _logarithm(seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.sign(seconds) * np.log1p(np.abs(seconds))
