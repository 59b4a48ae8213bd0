"""A station with replicas that a test steers: batches, crashes, hangs, replacements and the end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from tests.replicas import Steered
from tests.serving import planned
from torchship.errors import StageFailed, Unavailable
from torchship.pipeline import opening
from torchship.pipeline.faults import Fault
from torchship.serve.engine.ipc.messages import BatchDone, CardMemory
from torchship.serve.engine.line import Line
from torchship.serve.engine.replica import ReplicaEvents
from torchship.serve.engine.spec import LineLimits, WorkerSpec
from torchship.serve.engine.station import Station

ROW = np.array([[1, 2, 3, 4]], np.float32)


class Staff:
    """Starts steered replicas, as if on a `card`, and keeps them; the next `missing` starts fail."""

    def __init__(self, card: CardMemory | None = None) -> None:
        self.all: list[Steered] = []
        self.missing = 0
        self.card = card

    def start(self, spec: WorkerSpec, events: ReplicaEvents) -> Steered:
        if self.missing:
            self.missing -= 1
            raise Unavailable("no more processes")
        self.all.append(Steered(spec, events))
        self.all[-1].card = self.card
        return self.all[-1]


def run(
    work: Callable[[Line, Station, Staff], Awaitable[None]],
    stage: dict[str, Any],
    *,
    card: CardMemory | None = None,
    **limits: Any,
) -> None:
    async def bounded() -> None:
        staff = Staff(card)
        async with asyncio.timeout(60):
            line = await Line(planned(stage), limits=LineLimits(**limits), start=staff.start).open()
            try:
                await work(line, line.nodes[0].station, staff)
            finally:
                await line.close()

    asyncio.run(bounded())


async def turns(count: int = 3) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110  # the bound is around the whole test
        await asyncio.sleep(0.005)


def test_requests_of_one_turn_share_a_batch_and_those_that_come_while_it_runs_the_next() -> None:
    async def work(line: Line, station: Station, staff: Staff) -> None:
        (replica,) = staff.all
        first = [line.submit({"x": ROW * number}) for number in range(3)]
        await turns()
        second = [line.submit({"x": ROW * number}) for number in range(3, 9)]
        await turns()
        assert [len(batch.calls) for batch in replica.in_flight] == [3, 6]
        assert replica.room == 0
        replica.go()
        replica.go()
        for number, future in enumerate(first + second):
            assert np.array_equal((await future)["y"], ROW * number * 2)
        assert (station.meter.jobs, station.meter.calls) == (9, 2)

    run(work, {"run": "double"})


def test_after_a_crash_each_suspect_runs_alone_and_who_kills_again_is_blamed() -> None:
    async def work(line: Line, station: Station, staff: Staff) -> None:
        asked = [line.submit({"x": ROW * number}) for number in range(3)]
        await turns()
        staff.all[0].kill("crashed")
        await until(lambda: len(staff.all) == 2 and bool(staff.all[1].in_flight))
        assert [len(batch.calls) for batch in staff.all[1].in_flight] == [1, 1]
        for count in (3, 4):
            staff.all[-1].kill("crashed")
            await until(lambda count=count: len(staff.all) == count and bool(staff.all[-1].in_flight))  # type: ignore[misc]
        with pytest.raises(StageFailed, match="crashed"):
            await asked[0]
        while not all(future.done() for future in asked):
            staff.all[-1].go()
            await turns()
        assert [np.array_equal((await future)["y"], ROW * 2 * number) for number, future in enumerate(asked) if number]
        assert station.meter.restarts == 3

    run(work, {"run": "double"})


def test_what_waits_behind_a_process_that_says_it_ends_is_not_suspected() -> None:
    async def work(line: Line, station: Station, staff: Staff) -> None:
        guilty = line.submit({"x": ROW})
        await turns()
        behind = [line.submit({"x": ROW * number}) for number in range(2, 5)]
        await turns()
        first, second = staff.all[0].in_flight
        staff.all[0].in_flight.remove(first)
        ended = BatchDone(first.number, 0, 0, [], [Fault(0, "StageFailed", "lost")], last=True)
        station.on_result(staff.all[0], first, ended, [])
        with pytest.raises(StageFailed, match="lost"):
            await guilty
        staff.all[0].kill("lost")
        await until(lambda: len(staff.all) == 2 and bool(staff.all[1].in_flight))
        (again,) = staff.all[1].in_flight
        assert again.calls == second.calls, "they share a batch as before"
        assert not any(call.crashes or call.alone for call in again.calls)
        staff.all[1].go()
        for number, future in enumerate(behind, start=2):
            assert np.array_equal((await future)["y"], ROW * 2 * number)

    run(work, {"run": "double"})


def test_what_hangs_alone_is_blamed_at_once_and_not_run_again() -> None:
    async def work(line: Line, station: Station, staff: Staff) -> None:
        hung, behind = line.submit({"x": ROW}), None
        await turns()
        behind = line.submit({"x": ROW * 3})
        await turns()
        staff.all[0].in_flight[0].sent = staff.all[0].heard = time.monotonic() - 6.0
        await until(hung.done)
        with pytest.raises(StageFailed, match="hung: no answer for 5 s"):
            await hung
        await until(lambda: len(staff.all) == 2 and bool(staff.all[1].in_flight))
        assert len(staff.all[1].in_flight) == 1
        staff.all[1].go()
        assert np.array_equal((await behind)["y"], ROW * 6)

    run(work, {"run": "double"}, run_timeout=5.0)


@pytest.mark.parametrize(
    ("limits", "deadline", "allowed"),
    [({}, 0.0, 60.0), ({"timeout": 540.0}, 0.0, 540.0), ({"run_timeout": 5.0}, 0.0, 5.0),
     ({"run_timeout": 5.0}, 90.0, 90.0), ({"run_timeout": 5.0}, 2.0, 5.0), ({}, 9e9, 3600.0)],
)  # fmt: skip
def test_how_long_a_batch_may_run(limits: dict[str, Any], deadline: float, allowed: float) -> None:
    """`run_timeout`; where it is not set, the model's time-out; and a request's own time-out where that is longer."""

    async def work(line: Line, station: Station, staff: Staff) -> None:
        asked = line.submit({"x": ROW}, deadline=deadline)
        await turns()
        batch = staff.all[0].in_flight[0]
        station._check_hang(staff.all[0], batch, batch.sent + allowed - 1)
        assert staff.all[0].state == "ready"
        station._check_hang(staff.all[0], batch, max(batch.sent, staff.all[0].heard) + allowed + 1)
        assert staff.all[0].state == "stopping"
        asked.cancel()

    run(work, {"run": "double"}, **limits)


def test_what_no_kill_ends_is_told_to_the_watchdog() -> None:
    """A batch that runs beyond all limits though it was swept, and a killed worker that is still there."""

    async def work(line: Line, station: Station, staff: Staff) -> None:
        asked = line.submit({"x": ROW})
        await turns()
        replica = staff.all[0]
        start = max(replica.in_flight[0].sent, replica.heard)
        assert not list(station.stuck(start + 64.0))  # it may run for 60 s, and then be killed
        (words,) = station.stuck(start + 66.0)
        assert words == f"worker {replica.pid} of stage 'double' hangs, and killing it does not end it"
        replica.go()
        assert np.array_equal((await asked)["y"], ROW * 2)
        assert not list(station.stuck(start + 66.0))
        replica.killed = start
        assert not list(station.stuck(start + 4.0))
        assert list(station.stuck(start + 6.0)) == [words]
        replica.killed = 0.0

    run(work, {"run": "double"})


def test_a_replica_that_takes_too_much_memory_goes_when_its_successor_is_ready() -> None:
    async def work(line: Line, station: Station, staff: Staff) -> None:
        (old,) = staff.all
        asked = line.submit({"x": ROW})
        await turns()
        old.size = 2**21
        station.ping(time.monotonic(), 1)
        assert old.state == "ready"
        old.go()
        assert np.array_equal((await asked)["y"], ROW * 2)
        await until(lambda: old.state == "ended")
        assert len(staff.all) == 2
        assert staff.all[1].state == "ready"
        assert station.meter.restarts == 1
        assert station.replicas == [staff.all[1]]

    run(work, {"run": "double"}, memory=2**20)


def test_a_start_that_fails_is_tried_again_until_it_succeeds() -> None:
    async def work(line: Line, station: Station, staff: Staff) -> None:
        staff.missing = 6
        staff.all[0].kill("crashed")
        await until(lambda: station.broken is not None)
        with pytest.raises(Unavailable, match="cannot be kept running"):
            await line.submit({"x": ROW})
        await until(lambda: line.ready)
        asked = line.submit({"x": ROW})
        await turns()
        staff.all[1].go()
        assert np.array_equal((await asked)["y"], ROW * 2)

    run(work, {"run": "double"})


def test_nothing_runs_again_because_the_line_closes() -> None:
    async def work(line: Line, station: Station, staff: Staff) -> None:
        asked = [line.submit({"x": ROW}) for _ in range(20)]
        await turns()
        closing = asyncio.ensure_future(line.close())
        await closing
        for future in asked:
            with pytest.raises(Unavailable, match="was closed"):
                await future
        assert len(staff.all) == 1

    run(work, {"run": "double"})


def test_copies_are_dealt_out_to_devices_and_all_have_to_open(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(line: Line, station: Station, staff: Staff) -> None:
        assert [replica.spec.placement.device for replica in staff.all] == ["cuda:0", "cuda:1", "cuda:0"]
        assert {replica.spec.placement.threads for replica in staff.all} == {1}
        staff.all[1].kill("crashed")
        await until(lambda: len(staff.all) == 4)
        assert staff.all[3].spec.placement.device == "cuda:1"

    monkeypatch.setitem(opening._UNUSED, "run", ())  # a Python stage has no device: it is its own affair
    run(work, {"run": "double", "copies": 3, "device": ["cuda:0", "cuda:1"]})


def test_replicas_of_all_lines_open_in_turns() -> None:
    opening: list[int] = []
    staff = Staff()

    def start(spec: WorkerSpec, events: ReplicaEvents) -> Steered:
        made = staff.start(spec, events)
        opening.append(sum(replica.state == "opening" for replica in staff.all))
        return made

    async def work() -> None:
        turns = asyncio.Semaphore(2)
        lines = [Line(planned({"run": "double", "copies": 2}), start=start, turns=turns) for _ in range(4)]
        async with asyncio.timeout(60):
            await asyncio.gather(*(line.open() for line in lines))
            assert all(line.ready for line in lines)
            await asyncio.gather(*(line.close() for line in lines))

    asyncio.run(work())
    assert len(opening) == 8
    assert max(opening) == 2


def roomy(free: int) -> CardMemory:
    return CardMemory(held=2**30, free=free, total=16 * 2**30)


@pytest.mark.parametrize(
    ("wanted", "card", "copies", "kept"),
    [
        (None, None, 1, False),
        (True, None, 1, True),
        (True, None, 2, False),
        (None, roomy(2**31), 1, True),
        (None, roomy(2**31 - 1), 1, False),
        (True, roomy(2**30), 1, False),
        (False, roomy(2**34), 1, False),
    ],
)
def test_when_a_spare_worker_is_kept(wanted: bool | None, card: CardMemory | None, copies: int, kept: bool) -> None:
    async def work(line: Line, station: Station, staff: Staff) -> None:
        await turns()
        assert len(staff.all) == copies + kept
        assert len(station.replicas) == copies
        station.ping(time.monotonic() + 40, 2)
        await turns()
        assert len(staff.all) == copies + kept

    run(work, {"run": "double", "copies": copies}, card=card, spare=wanted)


def test_two_processes_have_to_fit_into_the_share() -> None:
    assert roomy(2**34).holds_another(share=0.125)
    assert not roomy(2**34).holds_another(share=0.124)


def test_a_spare_worker_takes_over_and_another_one_is_opened() -> None:
    async def work(line: Line, station: Station, staff: Staff) -> None:
        await until(lambda: len(staff.all) == 2 and staff.all[1].state == "ready")
        first, spare = staff.all
        asked = [line.submit({"x": ROW * number}) for number in range(3)]
        await turns()
        first.kill("crashed")
        await until(lambda: bool(spare.in_flight))
        assert station.replicas == [spare]
        assert len(staff.all) == 2, "nobody had to open anything"
        for _ in range(4):
            while spare.in_flight:
                spare.go()
            await turns()
        assert [np.array_equal((await future)["y"], ROW * 2 * number) for number, future in enumerate(asked)]
        station.ping(time.monotonic(), 2)
        await until(lambda: len(staff.all) == 3 and staff.all[2].state == "ready")
        assert station.replicas == [spare]
        assert station.meter.restarts == 1
        staff.all[2].kill("crashed while it waits")
        await until(lambda: staff.all[2].state == "ended")
        assert line.ready
        await line.close()
        assert {replica.state for replica in staff.all} == {"ended"}

    run(work, {"run": "double"}, spare=True)


def test_a_spare_worker_that_is_opening_is_waited_for_and_one_that_fails_is_not() -> None:
    async def work(line: Line, station: Station, staff: Staff) -> None:
        staff.all[0].kill("crashed")  # its spare has not begun to open
        await until(lambda: staff.all[0].state == "ended" and line.ready)
        assert len(staff.all) == 2
        assert station.replicas == [staff.all[1]]
        staff.missing = 1
        station.ping(time.monotonic(), 2)
        staff.all[1].kill("crashed")
        await until(lambda: staff.all[1].state == "ended" and line.ready)
        assert station.replicas == [staff.all[2]]

    run(work, {"run": "double"}, spare=True)
