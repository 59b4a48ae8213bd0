"""Finds the persons nearest to a vector: exactly below a size, by a short list and exact re-ranking above it."""

from __future__ import annotations

from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchship_faces.gallery.codes import Codes
from torchship_faces.gallery.state import Column, Rows, State

Floats = NDArray[np.float32]
EXACT_BELOW = 20_000
_EXACT_BLOCK = 16_384


@dataclass(frozen=True, slots=True)
class Hit:
    """A person and the cosine similarity of the nearest template, whose number is `serial`."""

    person: str
    score: float
    serial: int


class Finder:
    """The index over one State. `add` is called by one thread at a time, `nearest` by any number."""

    def __init__(self, state: State, *, exact_below: int, threads: int, packed: bytes = b"") -> None:
        """`packed` holds the codes of the rows that are there already, when they were kept."""
        self.state = state
        self._exact_below, self._threads = exact_below, threads
        self._growing = Lock()
        self._dense: Column | None = Column(np.float32, width=state.width)
        self._codes: Codes | None = None
        rows = len(state.vectors)
        if packed and rows > exact_below:
            codes = Codes(state.width, threads=threads)
            codes.load(packed, rows=rows)
            self._dense, self._codes = None, codes
        elif rows:
            self.add(rows)

    def add(self, rows: int) -> None:
        """The state has `rows` new rows at its end."""
        total = len(self.state.vectors)
        with self._growing:
            if self._codes is None and total > self._exact_below:
                codes = Codes(self.state.width, threads=self._threads)
                _fill(codes, self.state, 0, total)
                self._codes, self._dense = codes, None  # in this order: a reader without codes still has the rows
            elif self._codes is not None:
                _fill(self._codes, self.state, total - rows, total)
            elif self._dense is not None:
                self._dense.append(self.state.vectors.slice(total - rows, total).astype(np.float32))

    def packed(self) -> bytes:
        """The codes, for a snapshot; empty while the search is exact."""
        return self._codes.packed() if self._codes is not None else b""

    def close(self) -> None:
        """End the threads."""
        if self._codes is not None:
            self._codes.close()

    def nearest(
        self, queries: Floats, *, count: int, group: str = "", exact: bool = False, effort: int = 256
    ) -> list[list[Hit]]:
        """For each query (n, width; unit length) the `count` nearest persons, best first.

        `effort` is the length of the short list that is re-ranked exactly; `exact` compares every row instead.
        """
        if not len(self.state) or not len(queries):
            return [[] for _ in queries]
        codes, dense = self._codes, self._dense
        living = self.state.living(group)
        possible = int(np.count_nonzero(living))
        if not possible:
            return [[] for _ in queries]
        if dense is not None:
            return self._dense_nearest(queries, dense, living, count)
        if exact or codes is None or possible <= max(self._exact_below // 4, effort):
            rows = np.flatnonzero(living)
            return self._scan_rows(queries, rows, count)
        wanted = min(len(living), max(effort, 8 * count))
        if possible < len(living):  # a filter thins the list out
            wanted = min(len(living), int(wanted * min(64.0, len(living) / possible)))
        _, lists = codes.shortlist(queries, count=wanted)
        return [
            self._rank(query, rows, living, count) or self._widen(query, codes, living, count=count, wanted=8 * wanted)
            for query, rows in zip(queries, lists, strict=True)
        ]

    def _dense_nearest(self, queries: Floats, dense: Column, living: NDArray[np.bool_], count: int) -> list[list[Hit]]:
        vectors = dense.whole()
        size = min(len(vectors), len(living))
        width = min(size, max(64, 8 * count))
        answers = []
        for query in queries:  # one by one: BLAS threads that wait for a busy core cost more than they save
            line = vectors[:size] @ query
            line[~living[:size]] = -np.inf
            best = np.argpartition(-line, width - 1)[:width] if width < size else np.arange(size)
            answers.append(self._people(line[best], best, count))
            if len(answers[-1]) < count and width < size:  # many templates of few persons: look at all
                answers[-1] = self._people(line, np.arange(size), count)
        return answers

    def _scan_rows(self, queries: Floats, rows: Rows, count: int) -> list[list[Hit]]:
        keep = max(64, 8 * count)
        kept: list[tuple[list[NDArray[Any]], list[NDArray[Any]]]] = [([], []) for _ in queries]
        for start in range(0, len(rows), _EXACT_BLOCK):
            some = rows[start : start + _EXACT_BLOCK]
            scores = queries @ self.state.vectors.take(some).astype(np.float32).T
            for line, (best_scores, best_rows) in zip(scores, kept, strict=True):
                best = np.argpartition(-line, keep - 1)[:keep] if keep < len(line) else np.arange(len(line))
                best_scores.append(line[best])
                best_rows.append(some[best])
        return [self._people(np.concatenate(s), np.concatenate(r), count) for s, r in kept]

    def _rank(self, query: Floats, rows: Rows, living: NDArray[np.bool_], count: int) -> list[Hit]:
        """The persons of a short list by exact similarity; nothing when they are fewer than `count`."""
        rows = rows[(rows >= 0) & (rows < len(living))]
        rows = rows[living[rows]]
        vectors = self.state.vectors.take(rows).astype(np.float32)
        answer = self._people(np.einsum("ij,j->i", vectors, query), rows, count)  # einsum: no BLAS threads to wait for
        return answer if len(answer) == count else []

    def _widen(self, query: Floats, codes: Codes, living: NDArray[np.bool_], *, count: int, wanted: int) -> list[Hit]:
        """Longer short lists until one holds `count` persons, else every row."""
        while wanted < len(living) // 4:
            _, found = codes.shortlist(query[None], count=wanted)
            answer = self._rank(query, found[0], living, count)
            if answer:
                return answer
            wanted *= 8
        return self._scan_rows(query[None], np.flatnonzero(living), count)[0]

    def _people(self, scores: Floats, rows: Rows, count: int) -> list[Hit]:
        order = np.argsort(-scores, kind="stable")
        owners = self.state.owner.take(rows)
        answer: list[Hit] = []
        seen: set[int] = set()
        for position in order:
            if len(answer) == count or scores[position] == -np.inf:
                break
            owner = int(owners[position])
            person = self.state.people.ids[owner]
            if owner in seen or not person:
                continue
            seen.add(owner)
            serial = self.state.serial.take(rows[position : position + 1])
            answer.append(Hit(person, float(min(1.0, scores[position])), int(serial[0])))
        return answer


def _fill(codes: Codes, state: State, start: int, end: int) -> None:
    for begin in range(start, end, _EXACT_BLOCK):
        codes.add(state.vectors.slice(begin, min(end, begin + _EXACT_BLOCK)).astype(np.float32))
