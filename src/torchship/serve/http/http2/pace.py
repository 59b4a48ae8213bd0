"""How often a peer may do what costs us more than it costs them: resets, pings, settings, empty frames."""

from __future__ import annotations

from torchship.wire import frames as h2
from torchship.wire.frames import ConnectionFault

# a second and connection, with a burst of ten times that
_ALLOWED = {
    h2.RST_STREAM: 100.0,
    h2.SETTINGS: 10.0,
    h2.PING: 200.0,
    h2.PRIORITY: 200.0,
    h2.CONTINUATION: 1000.0,
    h2.HEADERS: 500.0,
    h2.DATA: 200.0,
    h2.WINDOW_UPDATE: 20_000.0,
}


class Pace:
    """Counts costly frames of one connection; each kind has a bucket that refills once a second."""

    __slots__ = ("_counts", "_now")

    def __init__(self) -> None:
        self._counts: dict[int, float] = {}
        self._now = 0.0

    def count(self, kind: int, now: float) -> None:
        """One more frame of a kind. Raises ConnectionFault ENHANCE_YOUR_CALM when it is too many."""
        if now != self._now:
            gone, self._now = now - self._now, now
            self._counts = {
                each: left
                for each, used in self._counts.items()
                if (left := used - _ALLOWED.get(each, 100.0) * gone) > 0
            }
        used = self._counts.get(kind, 0.0) + 1
        self._counts[kind] = used
        if used > 10 * _ALLOWED.get(kind, 100.0):
            raise ConnectionFault(h2.ENHANCE_YOUR_CALM, "too many frames that cost more than they say")
