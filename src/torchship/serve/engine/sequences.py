"""Sequences: the requests of one sequence run one after the other, in order, and always on the same worker.

A stage takes part by naming a parameter `sequence_id`; it may name `sequence_start` and `sequence_end` too.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torchship.errors import BadInput
from torchship.serve.engine.queue import Job, StageCall
from torchship.serve.engine.replica import Replica

_LONGEST = 256  # characters of a name
_MOST = 4096  # sequences at once


@dataclass(slots=True)
class _Sequence:
    running: Job | None
    last: float
    ended: bool = False
    waiting: deque[Job] = field(default_factory=deque)


class Pins:
    """Sequences by name; each keeps its replica until it is forgotten or the replica is lost."""

    def __init__(self) -> None:
        self._of: dict[str, Replica] = {}
        self.queues: dict[Replica, deque[StageCall]] = {}

    def __iter__(self) -> Iterator[StageCall]:
        for queue in self.queues.values():
            yield from queue

    def __bool__(self) -> bool:
        return any(self.queues.values())

    def put(self, call: StageCall, *, replicas: Sequence[Replica]) -> bool:
        """Queue a call for its replica; a new sequence gets the one with the fewest. False when there is none."""
        replica = self._of.get(call.sequence)
        if replica is None:
            if not replicas:
                return False
            held = Counter(self._of.values())
            replica = min(replicas, key=lambda one: (one.state != "ready", held[one]))
            self._of[call.sequence] = replica
        self.queues.setdefault(replica, deque()).append(call)
        return True

    def take(self) -> Iterator[tuple[Replica, StageCall]]:
        """Visits whose replicas have room now, one at a time."""
        for replica, queue in self.queues.items():
            while queue and replica.room:
                call = queue.popleft()
                if not call.job.done:
                    yield replica, call

    def forget(self, name: str) -> None:
        """A sequence is over."""
        self._of.pop(name, None)

    def lose(self, replica: Replica) -> tuple[list[str], list[StageCall]]:
        """A replica is gone: the sequences whose state went with it, and what waited for it."""
        names = [name for name, one in self._of.items() if one is replica]
        for name in names:
            del self._of[name]
        return names, list(self.queues.pop(replica, ()))


class Sequences:
    """The sequences of a line: `pins` are those of its stations, `idle` seconds without a request end a sequence."""

    def __init__(self, pins: Sequence[Pins], *, idle: float) -> None:
        self._pins = pins
        self._idle = idle
        self._open: dict[str, _Sequence] = {}

    def __len__(self) -> int:
        return len(self._open)

    @property
    def waiting(self) -> Iterator[Job]:
        """The jobs that wait for one before them."""
        for sequence in self._open.values():
            yield from sequence.waiting

    def enter(self, job: Job, name: str) -> bool:
        """Whether a job may run now; otherwise `left` gives it when its turn has come. Raises BadInput."""
        sequence = self._open.get(name)
        start, end = bool(job.parameters.get("sequence_start")), bool(job.parameters.get("sequence_end"))
        if sequence is None or (start and sequence.ended):
            if len(name) > _LONGEST:
                raise BadInput(f"sequence_id has {len(name)} characters", hint=f"it may have {_LONGEST}")
            if not start:
                raise BadInput(
                    f"sequence {name!r} was not started, or was idle for more than {self._idle:g} s",
                    hint="set sequence_start on its first request",
                )
            if len(self._open) >= _MOST:
                raise BadInput(f"there are {_MOST} sequences already", hint="end some, or wait until they are idle")
            if sequence is not None and (sequence.running or sequence.waiting):
                raise BadInput(f"sequence {name!r} is ending", hint="wait for its last answer, or use another id")
            sequence = self._open[name] = _Sequence(None, job.arrived)
        elif sequence.ended:
            raise BadInput(f"sequence {name!r} has ended", hint="set sequence_start on its first request")
        sequence.ended = end
        sequence.last = job.arrived
        if sequence.running is not None:
            sequence.waiting.append(job)
            return False
        sequence.running = job
        return True

    def left(self, job: Job, name: str, now: float) -> Job | None:
        """A job has been answered: the next of its sequence that is still wanted, if any."""
        sequence = self._open.get(name)
        if sequence is None or sequence.running is not job:
            return None
        sequence.last = now
        sequence.running = None
        while sequence.waiting and sequence.running is None:
            following = sequence.waiting.popleft()
            sequence.running = None if following.done else following
        if sequence.running is None and sequence.ended:
            self._end(name)
        return sequence.running

    def sweep(self, now: float) -> None:
        """End what has been idle for too long."""
        late = [name for name, one in self._open.items() if one.running is None and now - one.last > self._idle]
        for name in late:
            self._end(name)

    def break_off(self, name: str) -> list[Job]:
        """The state of a sequence is lost: it has to be started anew. What waited in it cannot run any more."""
        sequence = self._open.pop(name, None)
        return list(sequence.waiting) if sequence else []

    def _end(self, name: str) -> None:
        del self._open[name]
        for pins in self._pins:
            pins.forget(name)
