"""Pins: which worker of a station holds the state of which sequence, and what waits for that worker alone."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence

from torchship.serve.engine.queue import Visit
from torchship.serve.engine.replica import Worker


class Pins:
    """Sequences by name; each keeps its worker until it is forgotten or the worker is lost."""

    def __init__(self) -> None:
        self._of: dict[str, Worker] = {}
        self.queues: dict[Worker, deque[Visit]] = {}

    def __iter__(self) -> Iterator[Visit]:
        for queue in self.queues.values():
            yield from queue

    def __bool__(self) -> bool:
        return any(self.queues.values())

    def put(self, visit: Visit, *, workers: Sequence[Worker]) -> bool:
        """Queue a visit for its worker; a new sequence gets the one with the fewest. False when there is none."""
        worker = self._of.get(visit.sequence)
        if worker is None:
            if not workers:
                return False
            held = Counter(self._of.values())
            worker = min(workers, key=lambda one: (one.state != "ready", held[one]))
            self._of[visit.sequence] = worker
        self.queues.setdefault(worker, deque()).append(visit)
        return True

    def take(self) -> Iterator[tuple[Worker, Visit]]:
        """Visits whose workers have room now, one at a time."""
        for worker, queue in self.queues.items():
            while queue and worker.room:
                visit = queue.popleft()
                if not visit.job.done:
                    yield worker, visit

    def forget(self, name: str) -> None:
        """A sequence is over."""
        self._of.pop(name, None)

    def lose(self, worker: Worker) -> tuple[list[str], list[Visit]]:
        """A worker is gone: the sequences whose state went with it, and what waited for it."""
        names = [name for name, one in self._of.items() if one is worker]
        for name in names:
            del self._of[name]
        return names, list(self.queues.pop(worker, ()))
