"""When to try again: only what may pass by itself, with pauses that grow, and out of a budget."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from threading import Lock

from torchship.errors import Busy, TorchshipError, Unavailable


@dataclass(slots=True)
class Budget:
    """Retries of one client: `ratio` of all requests may be retries, `tokens` more are in reserve.

    So a server that is down gets no storm of retries (a retry budget, as in Finagle). Pauses are in seconds; `tries`
    counts the first one. All methods may be called from any thread.
    """

    tries: int = 3
    tokens: float = 10.0
    first_pause: float = 0.05
    longest_pause: float = 2.0
    ratio: float = 0.1
    _left: float = field(init=False)
    _lock: Lock = field(init=False, default_factory=Lock)

    def __post_init__(self) -> None:
        self._left = self.tokens

    def request(self) -> None:
        """A request begins: it brings its share of a retry."""
        with self._lock:
            self._left = min(self.tokens, self._left + self.ratio)

    def retry(self) -> bool:
        """Take a retry out of the budget; False where none is left."""
        with self._lock:
            paid = self._left >= 1.0
            self._left -= paid
            return paid

    def pause(self, error: TorchshipError, *, attempt: int, left: float) -> float | None:
        """Seconds to wait before the next try, or None where the error has to be raised.

        `attempt` counts from 1; `left` is the time that the caller has left.
        """
        if not isinstance(error, Busy | Unavailable) or attempt >= self.tries:
            return None
        pause = min(self.longest_pause, self.first_pause * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)  # noqa: S311
        if isinstance(error, Busy):
            pause = max(pause, error.retry_after)
        return pause if pause < left and self.retry() else None
