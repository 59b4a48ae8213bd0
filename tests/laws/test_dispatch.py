"""Laws of dispatch and arena: batches stay within their limits, everything comes out once, no slot is ever lost."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from torchship.serve.engine.ipc import arena
from torchship.serve.engine.ipc.arena import Arena
from torchship.serve.engine.queue import Dispatch, Job, StageCall


def call(rows: int, *, priority: int = 0, key: Any = None, deadline: float = 1e9) -> StageCall:
    job = Job({}, lambda job: None, {}, 0.0, priority)
    job.deadline = deadline
    return StageCall(job, [], rows, lambda call, outputs: None, {}, key)


class Queueing(RuleBasedStateMachine):
    """Put, take, put back, answer elsewhere, expire: in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = Dispatch(max_batch=8)
        self.inside: dict[int, StageCall] = {}
        self.out: dict[int, StageCall] = {}
        self.now = 0.0

    @rule(
        rows=st.integers(1, 8),
        priority=st.integers(0, 2),
        key=st.sampled_from([None, "a", "b"]),
        patience=st.sampled_from([1.0, 5.0, 1e9]),
    )
    def put(self, rows: int, priority: int, key: Any, patience: float) -> None:
        made = call(rows, priority=priority, key=key, deadline=self.now + patience)
        self.queue.put(made)
        self.inside[id(made)] = made

    @rule(limit=st.integers(0, 8))
    def take(self, limit: int) -> None:
        batch = self.queue.take(self.now, limit=limit)
        assert sum(found.rows for found in batch) <= 8
        assert not limit or len(batch) <= 1 or sum(found.rows for found in batch) <= limit
        assert len({(found.job.priority, found.key) for found in batch}) <= 1
        for found in batch:
            assert found.job.deadline > self.now
            assert not found.job.done
            assert len(batch) == 1 or not found.alone
            del self.inside[id(found)]
            self.out[id(found)] = found
        if batch:
            waiting = [v.job.priority for v in self.inside.values() if not v.job.done and v.job.deadline > self.now]
            assert all(batch[0].job.priority <= priority for priority in waiting)
        for found in self.queue.dropped:
            assert found.job.deadline <= self.now
            del self.inside[id(found)]
        self.queue.dropped.clear()

    @rule(alone=st.booleans())
    def put_back(self, alone: bool) -> None:
        for found in list(self.out.values())[:3]:
            found.alone = alone
            self.queue.put_back(found)
            self.inside[id(found)] = self.out.pop(id(found))

    @rule()
    def answer_one(self) -> None:
        for found in list(self.inside.values())[:1]:
            found.job.done = True

    @rule(seconds=st.sampled_from([0.5, 2.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def counts_agree(self) -> None:
        waiting = list(self.queue)
        assert self.queue.rows == sum(found.rows for found in waiting)
        assert {id(found) for found in waiting} <= set(self.inside)
        unseen = set(self.inside) - {id(found) for found in waiting}
        assert all(self.inside[found].job.done for found in unseen)


class Slots(RuleBasedStateMachine):
    """Slots are handed out once, and come back."""

    taken = Bundle("taken")

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena.make(depth=3, input_size=100, output_size=50)
        self.held: dict[int, int] = {}

    @rule(target=taken, mark=st.integers(1, 255))
    def acquire(self, mark: int) -> Any:
        if not self.arena.free:
            return multiple()
        slot = self.arena.free.pop()
        assert slot not in self.held
        for start, end in (self.arena.input_span(slot), self.arena.output_span(slot)):
            self.arena.region.memory[start:end] = bytes([mark]) * (end - start)
        self.held[slot] = mark
        return slot

    @rule(slot=consumes(taken))
    def release(self, slot: int) -> None:
        mark = self.held.pop(slot)
        for start, end in (self.arena.input_span(slot), self.arena.output_span(slot)):
            assert set(self.arena.region.memory[start:end]) == {mark}  # nobody else wrote here
        self.arena.free.append(slot)

    @invariant()
    def none_is_lost(self) -> None:
        assert len(self.arena.free) + len(self.held) == self.arena.depth

    def teardown(self) -> None:
        self.arena.region.close()


TestQueueing = Queueing.TestCase
TestQueueing.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestSlots = Slots.TestCase
TestSlots.settings = settings(max_examples=20, stateful_step_count=20, deadline=None)


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    kind=st.sampled_from([np.float32, np.int8, np.bool_, np.float64, np.float16]),
    tail=hnp.array_shapes(min_dims=0, max_dims=2, max_side=3),
    offset=st.sampled_from([0, 64, 640]),
    data=st.data(),
)
def test_rows_read_back_as_written(
    parts: list[int], kind: Any, tail: tuple[int, ...], offset: int, data: st.DataObject
) -> None:
    arrays = [data.draw(hnp.arrays(kind, (rows, *tail))) for rows in parts]
    memory = memoryview(bytearray(8192))
    block = arena.write(arrays, memory=memory, offset=offset)
    found = arena.read(block, dtype=np.dtype(kind), memory=memory)
    assert np.array_equal(found, np.concatenate(arrays), equal_nan=kind in (np.float16, np.float32, np.float64))
    assert block.size <= sum(map(arena.size_of, arrays))


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(st.lists(st.binary(max_size=9), max_size=4), min_size=1, max_size=4))
def test_bytes_read_back_as_written(parts: list[list[bytes]]) -> None:
    arrays = []
    for part in parts:
        arrays.append(np.empty(len(part), object))
        for index, item in enumerate(part):
            arrays[-1][index] = item
    memory = memoryview(bytearray(4096))
    block = arena.write(arrays, memory=memory, offset=64)
    assert block.size == sum(map(arena.size_of, arrays))
    found = arena.read(block, dtype=np.dtype(object), memory=memory)
    assert found.tolist() == [item for part in parts for item in part]
