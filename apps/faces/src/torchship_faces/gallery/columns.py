"""Arrays that grow at the end while others read them: readers keep the array they took, rows never move."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Column:
    """A growing array of rows over an unchanging first part (a memory-mapped file, say)."""

    def __init__(self, kind: type[np.generic], *, width: int = 0, first: NDArray[Any] | None = None) -> None:
        """`width` 0 is one value a row; `first` holds the rows that are there already."""
        shape = (0, width) if width else (0,)
        self._first: NDArray[Any] = np.empty(shape, kind) if first is None else first
        self._rest: NDArray[Any] = np.empty((64, *shape[1:]), kind)
        self._count = 0

    def __len__(self) -> int:
        return len(self._first) + self._count

    def append(self, rows: Sequence[Any] | NDArray[Any]) -> None:
        """Add rows. A reader in another thread sees them when its next `view` or `take` begins."""
        new = np.asarray(rows, self._rest.dtype)
        wanted = self._count + len(new)
        if wanted > len(self._rest):
            grown = np.empty((max(wanted, 2 * len(self._rest)), *self._rest.shape[1:]), self._rest.dtype)
            grown[: self._count] = self._rest[: self._count]
            self._rest = grown
        self._rest[self._count : wanted] = new
        self._count = wanted

    def parts(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """The unchanging part and the grown one, as views."""
        count = self._count
        return self._first, self._rest[:count]

    def take(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """The rows of these numbers, as a copy in memory."""
        first, rest = self.parts()
        if not len(rest) or (len(rows) and rows.max() < len(first)):
            return np.asarray(first[rows])
        if not len(first):
            return np.asarray(rest[rows])
        inside = rows < len(first)
        out = np.empty((len(rows), *rest.shape[1:]), rest.dtype)
        out[inside] = first[rows[inside]]
        out[~inside] = rest[rows[~inside] - len(first)]
        return out

    def slice(self, start: int, end: int) -> NDArray[Any]:
        """Rows `start` to `end`; a view where they lie in one part."""
        first, rest = self.parts()
        border = len(first)
        if end <= border:
            return first[start:end]
        if start >= border:
            return rest[start - border : end - border]
        return np.concatenate([first[start:], rest[: end - border]])

    def whole(self) -> NDArray[Any]:
        """All rows as one array."""
        return self.slice(0, len(self))

    def put(self, rows: NDArray[np.int64], value: Any) -> None:
        """Set rows in place (the first part must be in memory, not mapped read-only)."""
        first, rest = self.parts()
        first[rows[rows < len(first)]] = value
        rest[rows[rows >= len(first)] - len(first)] = value
