"""When to try again: only what may pass by itself, with pauses that grow, and out of a budget."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from torchship.errors import Busy, TorchshipError, Unavailable


@dataclass(slots=True)
class Budget:
    """Retries of one client. A failure takes a token, a good answer gives a tenth back; below half there are none.

    So a server that is down gets no storm of retries. Source: gRPC's retry throttling (proposal A6).
    """

    tries: int = 3
    tokens: float = 10.0
    first_pause: float = 0.05
    longest_pause: float = 2.0
    _left: float = field(init=False)

    def __post_init__(self) -> None:
        self._left = self.tokens

    def good(self) -> None:
        """An answer came."""
        self._left = min(self.tokens, self._left + 0.1)

    def pause(self, error: TorchshipError, *, attempt: int, left: float) -> float | None:
        """Seconds to wait before the next try, or None where the error has to be raised.

        `attempt` counts from 1; `left` is the time that the caller has left.
        """
        if not isinstance(error, Busy | Unavailable):
            return None
        self._left = max(0.0, self._left - 1.0)
        if attempt >= self.tries or self._left <= self.tokens / 2:
            return None
        pause = min(self.longest_pause, self.first_pause * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)  # noqa: S311
        if isinstance(error, Busy):
            pause = max(pause, error.retry_after)
        return pause if pause < left else None
