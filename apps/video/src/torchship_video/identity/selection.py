"""Which crops are worth an embedding: large, not hidden, not cut by the border, and better than those there are."""

from __future__ import annotations

import msgspec

from torchship_video.messages import Box, Observation, Track

_WHOLE = 160.0  # pixels of height from which more makes no better crop
_CUT = 0.3  # what a crop counts for that the border cuts
_BORDER = 2.0  # pixels
_MOST_TRACKS = 4096


class _Taken(msgspec.Struct):
    last: float
    qualities: list[float] = []


class CropChoice:
    """Chooses the tracks of an observation whose crops are to be embedded now.

    A track gives `kept` crops, at least `gap` seconds apart, and after that only one that is `better` times as good as
    its worst; nobody gives one below `least`, and one frame gives at most `most`, the best of them.
    """

    def __init__(
        self, *, kept: int = 6, gap: float = 0.3, better: float = 1.15, least: float = 0.12, most: int = 8
    ) -> None:
        self._kept, self._gap, self._better, self._least, self._most = kept, gap, better, least, most
        self._taken: dict[tuple[str, int], _Taken] = {}

    def choose(self, observation: Observation, *, time: float) -> list[tuple[Track, float]]:
        """The tracks with the quality of their boxes, best first."""
        camera, frame = observation.frame.camera, observation.frame
        boxes = [track.box for track in observation.tracks]
        wanted = []
        for number, track in enumerate(observation.tracks):
            if not (track.confirmed and track.seen):
                continue
            others = boxes[:number] + boxes[number + 1 :]
            quality = box_quality(track.box, others, width=frame.width, height=frame.height)
            if quality >= self._least and self._is_news((camera, track.number), quality, time):
                wanted.append((track, quality))
        wanted = sorted(wanted, key=lambda pair: -pair[1])[: self._most]
        for track, quality in wanted:
            self._note((camera, track.number), quality, time)
        return wanted

    def restarted(self, camera: str) -> None:
        """The tracker of a camera began anew."""
        self._taken = {key: taken for key, taken in self._taken.items() if key[0] != camera}

    def _is_news(self, key: tuple[str, int], quality: float, time: float) -> bool:
        taken = self._taken.get(key)
        if taken is None:
            return True
        if 0 <= time - taken.last < self._gap:
            return False
        return len(taken.qualities) < self._kept or quality > self._better * taken.qualities[-1]

    def _note(self, key: tuple[str, int], quality: float, time: float) -> None:
        taken = self._taken.pop(key, None) or _Taken(time)
        taken.last = time
        taken.qualities = sorted([*taken.qualities, quality], reverse=True)[: self._kept]
        self._taken[key] = taken  # at the end: the one that was longest without a crop goes first
        if len(self._taken) > _MOST_TRACKS:
            del self._taken[next(iter(self._taken))]


def box_quality(box: Box, others: list[Box], *, width: int, height: int) -> float:
    """From 0 to 1, by the box alone: its height, how much of it stands behind others, and whether the border cuts it.

    Who stands nearer to the camera has the lower feet: their boxes hide this one.
    """
    left, top, right, bottom = box
    area = (right - left) * (bottom - top)
    if area <= 0:
        return 0.0
    hidden = max((_overlap(box, other) / area for other in others if other[3] > bottom), default=0.0)
    cut = left < _BORDER or top < _BORDER or right > width - _BORDER or bottom > height - _BORDER
    return min(1.0, (bottom - top) / _WHOLE) * (1 - min(hidden, 1.0)) * (_CUT if cut else 1.0)


def _overlap(one: Box, other: Box) -> float:
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    return max(wide, 0.0) * max(high, 0.0)
