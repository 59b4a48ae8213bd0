"""A line whose workers are threads of the host: what still holds, and what one process cannot do."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import uvloop

from tests.serving import planned
from torchship.errors import BadConfig, StageFailed, Unavailable
from torchship.serve import config, host
from torchship.serve.engine.launch import WorkerThread
from torchship.serve.engine.line import Line
from torchship.serve.engine.replica import LocalReplica, Replica, ReplicaEvents
from torchship.serve.engine.spec import LineLimits, Placement, WorkerSpec

ROW = np.array([[1, 2, 3, 4]], np.float32)


def threaded(spec: WorkerSpec, events: ReplicaEvents) -> Replica:
    return LocalReplica(spec, events, launch=WorkerThread)


class InOneProcess:
    """A line of threads that is closed at the end."""

    def __init__(self, *stages: dict[str, Any], **limits: Any) -> None:
        self._stages, self._limits = stages, limits

    async def __aenter__(self) -> Line:
        self.line = await Line(planned(*self._stages), limits=LineLimits(**self._limits), start=threaded).open()
        return self.line

    async def __aexit__(self, *fault: object) -> None:
        await self.line.close(grace=1.0)


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await work()

    uvloop.run(bounded())


def test_it_runs_in_this_process_and_leaves_nothing() -> None:
    async def work() -> None:
        before = threading.active_count()
        async with InOneProcess({"run": "sleeper", "copies": 2}) as line:
            found = await line.submit({"ms": np.array([0], np.int32)})
            assert found["pid"].tolist() == [os.getpid()]
        assert threading.active_count() == before

    run(work)  # the loop keeps a descriptor or two of its own from its first time
    gc.collect()
    descriptors = len(os.listdir("/proc/self/fd"))
    run(work)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_one_bad_input_does_not_fail_its_neighbours() -> None:
    async def work() -> None:
        async with InOneProcess({"run": "moody"}) as line:
            rows = [np.full((1, 4), value, np.float32) for value in (1, 2, 13, 4, 5)]
            found = await asyncio.gather(*(line.submit({"x": row}) for row in rows), return_exceptions=True)
            assert str(found[2]) == "stage 'moody' raised ValueError: thirteen"
            for row, answer in zip(rows, found, strict=True):
                assert isinstance(answer, StageFailed) == (row[0, 0] == 13)
                if not isinstance(answer, BaseException):
                    assert np.array_equal(answer["y"], row + 1)

    run(work)


def test_a_stream_ends_when_nobody_wants_it() -> None:
    async def work() -> None:
        async with InOneProcess({"run": "endless"}) as line:
            seen = []
            async for part in line.stream({"n": np.array([5], np.int32)}):
                seen.append(int(part["i"][0]))
                if len(seen) == 3:
                    break
            assert seen == [5, 6, 7]
            async for part in line.stream({"n": np.array([0], np.int32)}):  # the worker is free again
                assert part["i"].tolist() == [0]
                break

    run(work)


def test_a_hang_fails_its_request_and_opens_no_second_copy_until_it_is_over() -> None:
    async def work() -> None:
        async with InOneProcess({"run": "sleeper"}, run_timeout=0.2) as line:
            with pytest.raises(StageFailed, match=r"hung: no answer for 0\.2 s"):
                await line.submit({"ms": np.array([1500], np.int32)})
            (name,) = [name for name in WorkerThread.stuck() if "sleeper" in name]
            assert sum(thread.name == name for thread in threading.enumerate()) == 1
            async with asyncio.timeout(20):
                while not line.ready:  # the hung call returns, and then another thread opens
                    assert sum(thread.name == name for thread in threading.enumerate()) <= 1
                    await asyncio.sleep(0.01)
            assert (await line.submit({"ms": np.array([0], np.int32)}))["pid"].tolist() == [os.getpid()]

    run(work)


def test_a_stage_that_does_not_open_is_told() -> None:
    async def work() -> None:
        line = Line(planned({"run": "Adder", "options": {"start": -1.0}}), limits=LineLimits(), start=threaded)
        with pytest.raises(StageFailed, match="start is negative"):
            await line.open()

    run(work)


@pytest.mark.parametrize(
    ("change", "word"),
    [({"placement": Placement(device="cuda:0")}, "the device cuda:0"), ({"limits": LineLimits(memory=2**30)}, "a mem")],
)
def test_what_one_process_cannot_give_is_refused(change: dict[str, Any], word: str) -> None:
    def start(spec: WorkerSpec, events: ReplicaEvents) -> Replica:
        return threaded(msgspec.structs.replace(spec, **change), events)

    async def work() -> None:
        with pytest.raises(BadConfig, match=word):
            await Line(planned({"run": "double"}), limits=LineLimits(), start=start).open()

    run(work)


def test_receivers_and_one_process_exclude_each_other() -> None:
    wish = {"one_process": True, "http": {"receivers": 2}, "model": [{"name": "m", "run": "tests.serving:double"}]}
    with pytest.raises(BadConfig, match=r"\$\.http\.receivers"):
        host.Server(config.convert(wish))


def test_a_server_reloads_and_drains_in_one_process(tmp_path: Path) -> None:
    """The old version answers what it has, then its thread leaves."""

    async def work() -> None:
        model = {"name": "slow", "run": "tests.serving:sleeper"}
        wish = {"one_process": True, "http": {"port": 0}, "store": {"root": str(tmp_path)}, "model": [model]}
        server = await host.Server(config.convert(wish)).open()
        line = server.catalog.entry("slow").current
        assert line is not None
        late = line.submit({"ms": np.array([300], np.int32)})
        await server.catalog.load(server.config.model[0])
        assert (await late)["pid"].tolist() == [os.getpid()]
        now = server.catalog.entry("slow").current
        assert now is not None
        assert now is not line
        assert (await now.submit({"ms": np.array([0], np.int32)}))["pid"].tolist() == [os.getpid()]
        await server.close()
        with pytest.raises(Unavailable):
            await now.submit({"ms": np.array([0], np.int32)})

    run(work)
