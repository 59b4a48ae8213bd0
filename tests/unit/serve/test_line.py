"""Faults, time-outs, limits, streams and the end of a line, with real workers."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import uvloop

from tests.serving import planned
from torchship import process
from torchship.errors import BadInput, Busy, Expired, StageFailed, TorchshipError, Unavailable
from torchship.pipeline import opening
from torchship.serve import prometheus
from torchship.serve.engine.line import Line
from torchship.serve.engine.spec import LineLimits

ROW = np.array([[1, 2, 3, 4]], np.float32)


class Opened:
    """A line that is closed at the end."""

    def __init__(self, *stages: dict[str, Any], **limits: Any) -> None:
        self._stages, self._limits = stages, limits
        self.line: Line

    async def __aenter__(self) -> Line:
        self.line = await Line(planned(*self._stages), limits=LineLimits(**self._limits)).open()
        return self.line

    async def __aexit__(self, *fault: object) -> None:
        await self.line.close(grace=1.0)
        assert self.line.state == "closed"


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await work()

    uvloop.run(bounded())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  # a condition of another process has no event
            await asyncio.sleep(0.01)


def test_one_bad_input_does_not_fail_its_neighbours() -> None:
    async def work() -> None:
        async with Opened({"run": "moody"}) as line:
            rows = [np.full((1, 4), value, np.float32) for value in (1, 2, 13, 4, 5)]
            found = await asyncio.gather(*(line.submit({"x": row}) for row in rows), return_exceptions=True)
            assert isinstance(found[2], StageFailed)
            assert str(found[2]) == "stage 'moody' raised ValueError: thirteen"
            for row, answer in zip(rows, found, strict=True):
                if not isinstance(answer, BaseException):
                    assert np.array_equal(answer["y"], row + 1)
            assert sum(isinstance(answer, BaseException) for answer in found) == 1

    run(work)


def test_a_deadly_input_is_blamed_alone_with_its_signal(caplog: pytest.LogCaptureFixture) -> None:
    """What the worker printed may hold other callers' data: it is in the log, by the pid that the answer names."""

    async def work() -> None:
        async with Opened({"run": "moody"}) as line:
            rows = [np.full((1, 4), value, np.float32) for value in (1, 2, 666, 4, 5, 6, 7, 8)]
            found = await asyncio.gather(*(line.submit({"x": row}) for row in rows), return_exceptions=True)
            assert isinstance(found[2], StageFailed)
            assert "SIGKILL" in str(found[2])
            assert "about to die" not in str(found[2])
            told = [record.getMessage() for record in caplog.records if "about to die" in record.getMessage()]
            assert any(text.split("; its")[0] in str(found[2]) for text in told if "; its last lines" in text)
            assert [isinstance(answer, BaseException) for answer in found] == [value == 666 for value in (
                1, 2, 666, 4, 5, 6, 7, 8)]  # fmt: skip
            await until(lambda: line.ready)
            assert line.nodes[0].station.meter.restarts >= 2

    run(work)


def test_a_hung_worker_is_replaced_and_its_job_blamed() -> None:
    async def work() -> None:
        async with Opened({"run": "moody"}, run_timeout=0.3) as line:
            with pytest.raises(StageFailed, match=r"hung: no answer for 0\.3 s"):
                await line.submit({"x": ROW * 0 + 777})
            assert np.array_equal((await line.submit({"x": ROW}))["y"], ROW + 1)

    run(work)


def test_late_jobs_are_answered_in_time_and_never_run() -> None:
    async def work() -> None:
        async with Opened({"run": "sleeper"}) as line:
            slow = line.submit({"ms": np.array([400], np.int32)})
            behind = [line.submit({"ms": np.array([0], np.int32)}, deadline=0.05) for _ in range(5)]
            started = asyncio.get_running_loop().time()
            found = await asyncio.gather(*behind, return_exceptions=True)
            assert all(isinstance(fault, Expired) for fault in found)
            assert asyncio.get_running_loop().time() - started < 0.39  # before the slow one was done
            await slow
            assert line.nodes[0].station.meter.jobs <= 2  # the one that had been sent ahead, at most

    run(work)


def test_a_full_line_says_busy_and_recovers() -> None:
    async def work() -> None:
        async with Opened({"run": "double"}, queue_rows=4) as line:
            asked = [line.submit({"x": ROW}) for _ in range(4)]
            with pytest.raises(Busy, match="the line is full") as caught:
                line.submit({"x": ROW})
            assert caught.value.retry_after > 0
            await asyncio.gather(*asked)
            big = np.ones((9, 4), np.float32)  # more than fits, but nothing else is there
            assert np.array_equal((await line.submit({"x": big}))["y"], big * 2)
            assert line.meter.failures == {"REJECTED": 1}

    run(work)


def test_inputs_are_checked_at_the_edge() -> None:
    async def work() -> None:
        async with Opened({"run": "double"}, {"run": "sums"}) as line:
            for tensors, text in (
                ({"x": ROW.astype(np.float64)}, "datatype FP64, expected FP32"),
                ({"x": ROW[0]}, "shape"),
                ({"x": ROW[:, :3]}, "axis 1 is 3, expected 4"),
                ({"x": ROW[:0]}, "expected at least 1"),
                ({"z": ROW}, "missing"),
                ({"x": ROW, "z": ROW}, "unknown"),
            ):
                with pytest.raises(BadInput, match=text):
                    line.submit(tensors)
            with pytest.raises(BadInput, match="offset"):
                line.submit({"x": ROW}, parameters={"offset": 10})
            assert line.admission.jobs == 0

    run(work)


def test_cancelled_jobs_leave_the_line() -> None:
    async def work() -> None:
        async with Opened({"run": "sleeper"}) as line:
            slow = line.submit({"ms": np.array([300], np.int32)})
            asked = [line.submit({"ms": np.array([100], np.int32)}) for _ in range(10)]
            for future in asked:
                future.cancel()
            await slow
            await until(lambda: line.admission.jobs == 0)
            assert line.nodes[0].station.meter.jobs <= 2
            assert line.meter.failures == {"CANCELED": 10}

    run(work)


def test_streams_give_every_answer_and_then_the_fault() -> None:
    async def collect(answers: AsyncIterator[Any]) -> list[int]:
        return [int(answer["i"][0]) async for answer in answers]

    async def work() -> None:
        async with Opened({"run": "count"}) as line:
            assert await collect(line.stream({"n": np.array([5], np.int32)})) == [0, 1, 2, 3, 4]
            assert await collect(line.stream({"n": np.array([0], np.int32)})) == []
            seen = []
            with pytest.raises(StageFailed, match="seven"):  # noqa: PT012
                async for answer in line.stream({"n": np.array([9], np.int32)}):
                    seen.append(int(answer["i"][0]))
            assert seen == list(range(7))

    run(work)


def test_a_stage_must_give_what_it_declares() -> None:
    async def work() -> None:
        async with Opened({"run": "wrong"}) as line:
            with pytest.raises(StageFailed, match="FP64"):
                await line.submit({"x": np.ones(1, np.float32)})

    run(work)


def test_big_and_odd_tensors_travel_in_memory_of_their_own() -> None:
    async def work() -> None:
        async with Opened({"run": "upper"}) as line:
            for words in ([b"a"], [], [b"x" * 3_000_000, b"", b"\x00y\x00"]):
                text = np.empty(len(words), object)
                text[:] = words
                found = (await line.submit({"text": text}))["upper"] if words else text
                assert found.tolist() == [word.upper() for word in words]
        async with Opened({"run": "mean"}) as line:
            rows = [np.ones((2, width), np.float32) * width for width in (1, 3, 3, 70_000, 1)]
            found_all = await asyncio.gather(*(line.submit({"x": row}) for row in rows))
            assert [found["mean"].tolist() for found in found_all] == [[row.shape[1]] * 2 for row in rows]

    run(work)


def test_what_does_not_open_says_why_and_leaves_nothing() -> None:
    async def work() -> None:
        me = psutil.Process()
        before = {child.pid for child in me.children(recursive=True)}
        with pytest.raises(TorchshipError, match="start is negative"):
            async with Opened({"run": "Adder", "options": {"start": -1.0}}, {"run": "wrong", "inputs": {"x": "total"}}):
                pass
        assert {child.pid for child in me.children(recursive=True)} <= before

    run(work)


def test_time_without_a_processor_is_given_back_to_a_worker_that_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    def crowded(pid: int) -> float:
        seen.append(len(seen) + 1.0)
        return len(seen) * 20.0  # as if it had waited all the time

    async def work() -> None:
        with pytest.raises(Unavailable, match="did not open within"):
            async with Opened({"run": "Adder"}, open_timeout=0.01):
                pass
        monkeypatch.setattr(process, "waited_for_processor", crowded)
        async with Opened({"run": "Adder"}, open_timeout=0.01) as line:
            assert line.ready
        assert seen

    run(work)


def test_closing_again_waits_for_what_the_first_time_did_not() -> None:
    async def work() -> None:
        line = await Line(planned({"run": "double"})).open()
        replicas = list(line.stations[0].replicas)
        first = asyncio.ensure_future(line.close())
        await asyncio.sleep(0)
        first.cancel()
        await line.close()
        assert [replica.state for replica in replicas] == ["ended"]

    run(work)


def test_closing_answers_everybody_and_leaves_nothing() -> None:
    async def work() -> None:
        me = psutil.Process()
        descriptors = len(os.listdir("/proc/self/fd"))
        async with Opened({"run": "sleeper", "copies": 2}) as line:
            pids = {worker.pid for worker in line.nodes[0].station.replicas}
            asked = [line.submit({"ms": np.array([50], np.int32)}) for _ in range(4)]
            await line.drain()
            found = await asyncio.gather(*asked)
            assert {int(answer["pid"][0]) for answer in found} <= pids
            with pytest.raises(Unavailable, match="draining"):
                line.submit({"ms": np.array([50], np.int32)})
        assert not pids & {child.pid for child in me.children(recursive=True)}
        assert len(os.listdir("/proc/self/fd")) == descriptors

    run(work)


def test_replicas_share_the_work() -> None:
    async def work() -> None:
        async with Opened({"run": "sleeper", "copies": 2}) as line:
            asked = [line.submit({"ms": np.array([50], np.int32)}) for _ in range(8)]
            found = await asyncio.gather(*asked)
            assert len({int(answer["pid"][0]) for answer in found}) == 2

    run(work)


def test_a_crash_loop_opens_the_circuit_and_it_closes_again() -> None:
    async def work() -> None:
        async with Opened({"run": "moody"}) as line:
            station = line.nodes[0].station
            for _ in range(40):
                if station.broken:
                    break
                await asyncio.gather(line.submit({"x": ROW * 0 + 666}), return_exceptions=True)
            assert station.broken
            assert not line.ready
            assert "SIGKILL" in str(station.broken)
            with pytest.raises(Unavailable, match="cannot be kept running"):
                await line.submit({"x": ROW})
            await until(lambda: line.ready)
            assert np.array_equal((await line.submit({"x": ROW}))["y"], ROW + 1)

    run(work)


def test_a_worker_that_takes_too_much_memory_or_loses_its_device_is_replaced() -> None:
    async def ask(line: Line, mib: int) -> int:
        return int((await line.submit({"mib": np.array([mib], np.int32)}))["pid"][0])

    async def work() -> None:
        async with Opened({"run": "Hog"}, memory=400 * 2**20) as line:
            first = await ask(line, 1)
            await ask(line, 500)
            station = line.nodes[0].station
            await until(lambda: station.meter.restarts == 1 and line.ready)
            second = await ask(line, 1)
            assert second != first
            with pytest.raises(StageFailed, match="CUDA error"):
                await ask(line, -1)
            await until(lambda: station.meter.restarts == 2 and line.ready)
            assert await ask(line, 1) not in (first, second)

    run(work)


def test_a_row_that_loses_the_device_fails_alone() -> None:
    async def ask(line: Line, value: float) -> float:
        return float((await line.submit({"x": np.array([value], np.float32)}))["y"][0])

    async def work() -> None:
        async with Opened({"run": "Card"}) as line:
            answers = await asyncio.gather(
                *(ask(line, value) for value in (500, 1, 2, 666, 3, 4)), return_exceptions=True
            )
            assert answers[:3] + answers[4:] == [501, 2, 3, 4, 5]
            assert isinstance(answers[3], StageFailed)
            assert str(answers[3]).endswith("CUDA error: device-side assert triggered")
            assert await ask(line, 9) == 10

    run(work)


def test_metrics_are_readable_and_tell_what_happened() -> None:
    async def work() -> None:
        async with Opened({"run": "double"}, {"run": "sums"}) as line:
            for rows in (1, 3, 3):
                await line.submit({"x": np.ones((rows, 4), np.float32)})
            with pytest.raises(BadInput):
                line.submit({"x": ROW[:, :2]})
            text = prometheus.render({('odd"name', "1"): line})
            found = {}
            for line_of_text in text.splitlines():
                if not line_of_text.startswith("#"):
                    name, _, value = line_of_text.rpartition(" ")
                    found[name.replace('model="odd\\"name",version="1"', "m")] = float(value)
            assert found["nv_inference_request_success{m}"] == 3
            assert found["nv_inference_count{m}"] == 7
            assert found["nv_inference_exec_count{m}"] == 3
            assert found['nv_inference_request_failure{m,reason="REJECTED"}'] == 1
            assert found['torchship_batches_total{m,stage="sums",rows="3"}'] == 2
            assert found['torchship_workers_ready{m,stage="double"}'] == 1
            assert found['torchship_arena_slots_used{m,stage="double"}'] == 0
            assert found["nv_inference_first_response_histogram_ms_count{m}"] == 3
            assert (
                found["nv_inference_request_duration_us{m}"] >= found["nv_inference_compute_infer_duration_us{m}"] > 0
            )

    run(work)


def test_a_station_does_not_run_ahead_and_nothing_stalls() -> None:
    async def work() -> None:
        stages = ({"run": "double"}, {"run": "moody", "inputs": {"x": "y"}})
        async with Opened(*stages, run_timeout=0.5) as line:
            ahead, behind = (node.station for node in line.nodes)
            rows = np.ones((8, 4), np.float32)
            hang = line.submit({"x": rows * 388.5}, deadline=2.0)
            await asyncio.sleep(0.1)
            asked = [line.submit({"x": rows}, deadline=0.3) for _ in range(30)]
            await asyncio.sleep(0.1)
            assert len(behind.queue) <= 6
            assert len(ahead.queue) >= 20
            found = await asyncio.gather(hang, *asked, return_exceptions=True)
            assert all(isinstance(fault, Expired | StageFailed) for fault in found)
            await until(lambda: line.ready)
            assert np.array_equal((await line.submit({"x": rows}))["y"], rows * 2 + 1)
            assert line.admission.jobs == 0

    run(work)


def test_a_flooded_model_does_not_hold_up_another() -> None:
    async def work() -> None:
        async with Opened({"run": "sleeper"}) as busy, Opened({"run": "double"}) as other:
            flood = [busy.submit({"ms": np.array([30], np.int32)}) for _ in range(40)]
            for _ in range(5):
                await other.submit({"x": ROW})
            assert sum(not future.done() for future in flood) > 20
            await asyncio.gather(*flood)

    run(work)


def test_a_host_that_was_held_up_does_not_blame_its_workers() -> None:
    async def work() -> None:
        async with Opened({"run": "moody"}) as line:
            (worker,) = line.nodes[0].station.replicas
            line._beat -= 60.0
            worker.heard -= 60.0
            line._ping()
            assert worker.state == "ready"
            worker.heard -= 60.0  # and now it is the worker that says nothing
            line._ping()
            assert worker.state == "stopping"
            await until(lambda: line.ready)

    run(work)


def test_workers_keep_to_their_cores_and_let_others_go_first() -> None:
    async def work() -> None:
        core = max(os.sched_getaffinity(0))
        async with Opened({"run": "moody", "copies": 2}, cpus=(core,), nice=5) as line:
            for worker in line.nodes[0].station.replicas:
                assert os.sched_getaffinity(worker.pid) == {core}
                assert os.getpriority(os.PRIO_PROCESS, worker.pid) >= 5

    run(work)


@pytest.mark.parametrize("how", ["exit", "cancel", "interrupt", "close", "surrogate", "long", "mute", "stop", "ours"])
def test_whatever_a_stage_raises_fails_its_own_request_only(how: str) -> None:
    async def work() -> None:
        async with Opened({"run": "tantrum"}) as line:
            before = await line.submit({"how": np.array([b"", None], object)[:1]})
            asked = [line.submit({"how": np.array([word, None], object)[:1]}) for word in (b"", how.encode(), b"")]
            with pytest.raises(TorchshipError, match="stage 'tantrum'") as caught:
                await asked[1]
            assert len(str(caught.value)) < 3000
            str(caught.value).encode()
            for future in (asked[0], asked[2]):
                assert (await future)["pid"] == before["pid"]
            assert line.nodes[0].station.meter.restarts == 0

    run(work)


def test_parameters_of_any_length_arrive() -> None:
    async def work() -> None:
        async with Opened({"run": "long_words"}) as line:
            with pytest.raises(BadInput, match=r"parameter 'seed' is 1\.18e\+21"):
                line.submit({"x": ROW[0, :1]}, parameters={"seed": 2**70})
            for size in (10, 3_000_000, 70_000):
                asked = [line.submit({"x": ROW[0, :1]}, parameters={"prompt": "p" * size}) for _ in range(5)]
                assert [int((await future)["size"][0]) for future in asked] == [size] * 5

    run(work)


def test_a_group_s_signals_do_not_reach_workers() -> None:
    async def work() -> None:
        async with Opened({"run": "sleeper"}) as line:
            (replica,) = line.nodes[0].station.replicas
            asked = line.submit({"ms": np.array([300], np.int32)})
            await asyncio.sleep(0.1)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                os.kill(replica.pid, number)
            assert int((await asked)["pid"][0]) == replica.pid
            assert line.nodes[0].station.meter.restarts == 0

    run(work)


def test_a_stream_waits_for_its_reader_and_ends_with_it() -> None:
    async def work() -> None:
        async with Opened({"run": "endless"}) as line:
            (replica,) = line.nodes[0].station.replicas
            answers = line.stream({"n": np.array([0], np.int32)})
            assert int((await anext(answers))["i"][0]) == 0
            await until(lambda: replica.in_flight[0].unread == 16)
            await asyncio.sleep(0.3)
            assert replica.in_flight[0].unread == 16  # so many are made ahead, and no more
            for number in range(1, 100):
                assert int((await anext(answers))["i"][0]) == number
            await answers.aclose()
            await until(lambda: not replica.in_flight)
            assert line.meter.failures == {"CANCELED": 1}
            with pytest.raises(Expired):
                async for _ in line.stream({"n": np.array([0], np.int32)}, deadline=0.3):
                    pass
            await until(lambda: not replica.in_flight)
            assert line.nodes[0].station.meter.restarts == 0

    run(work)


def test_a_stream_that_is_dropped_before_its_turn_never_begins() -> None:
    async def first(line: Line) -> None:
        async for _ in line.stream({"n": np.array([0], np.int32)}):
            await asyncio.sleep(10)

    async def work() -> None:
        async with Opened({"run": "endless"}) as line:
            (replica,) = line.nodes[0].station.replicas
            running = asyncio.ensure_future(first(line))
            await until(lambda: bool(replica.in_flight) and replica.in_flight[0].unread == 16)
            waiting = asyncio.ensure_future(first(line))
            await until(lambda: len(replica.in_flight) == 2)
            waiting.cancel()
            await asyncio.sleep(0.1)
            running.cancel()
            await until(lambda: not replica.in_flight)
            answers = line.stream({"n": np.array([5], np.int32)})
            assert int((await anext(answers))["i"][0]) == 5
            await answers.aclose()

    run(work)


def test_sizes_of_batches_are_few_labels() -> None:
    """A label of a metric has few values, whatever callers send."""

    async def work() -> None:
        async with Opened({"run": "double"}) as line:
            for size in range(1, 5000):
                line.nodes[0].station.meter.count(1, size, 1, 0.0, (0.0, 0.0, 0.0))
            text = prometheus.render({("m", "1"): line})
            counts = {
                int(row.split('rows="')[1].split('"')[0]): float(row.rpartition(" ")[2])
                for row in text.splitlines()
                if row.startswith("torchship_batches_total{")
            }
            assert sorted(counts) == [*range(1, 65), 128, 256, 512, 1024, 2048, 4096, 8192]
            assert counts[64] == 1
            assert counts[128] == 64
            assert sum(counts.values()) == 4999

    run(work)


def test_calls_with_other_inputs_share_no_batch() -> None:
    async def work() -> None:
        async with Opened({"run": "shifted"}, nan="refuse") as line:
            word = np.array([[b"w"]], object)
            kinds: list[dict[str, Any]] = [{}, {"bias": ROW}, {"word": word}, {"bias": ROW, "word": word}]
            found = await asyncio.gather(*(line.submit({"x": ROW * n, **kinds[n % 4]}) for n in range(16)))
            for number, answer in enumerate(found):
                kind = kinds[number % 4]
                assert answer["rows"].tolist() == [4]  # with its like, all of them, and with nobody else
                assert np.array_equal(answer["y"], ROW * number + kind.get("bias", 0))
                assert answer["said"].tolist() == [b"w" if "word" in kind else b"none"]
            assert line.nodes[0].station.meter.calls == 4
            many = await line.submit({"x": np.repeat(ROW, 19, 0), "word": np.repeat(word, 19, 0)})  # in three parts
            assert many["y"].tolist() == np.repeat(ROW, 19, 0).tolist()
            assert many["said"].tolist() == [b"w"] * 19
            with pytest.raises(BadInput, match="'bias' holds NaN"):
                line.submit({"x": ROW, "bias": ROW * np.nan})
            with pytest.raises(BadInput, match=r"missing \['x'\]"):
                line.submit({"bias": ROW})
        assert line.admission.jobs == 0

    run(work)


def test_a_killed_worker_is_replaced_by_the_spare_one_that_has_opened_already(tmp_path: Path) -> None:
    """Opening ends only where no file says wait: who is asked after the kill was open before it."""
    file = tmp_path / "opened"

    def pids() -> list[int]:
        return [int(word) for word in file.read_text().split()] if file.exists() else []

    async def work() -> None:
        async with Opened({"run": "Slow", "options": {"file": str(file)}}, spare=True) as line:
            (station,) = line.stations
            await until(lambda: len(station.processes) == 2 and station.processes[1].state == "ready")
            where = {("m", "1"): line}
            assert 'torchship_workers_spare{model="m",version="1",stage="slow"} 1' in prometheus.render(where)
            gate = tmp_path / "opened.closed"
            gate.touch()  # from now on nobody opens
            first, spare = pids()
            assert (await line.submit({"x": np.ones(1, np.float32)}))["pid"] == [first]
            os.kill(first, signal.SIGKILL)
            assert (await line.submit({"x": np.ones(1, np.float32)}))["pid"] == [spare]
            await until(lambda: len(pids()) == 3)  # another spare has begun to open
            assert line.ready
            assert 'torchship_workers_spare{model="m",version="1",stage="slow"} 0' in prometheus.render(where)
            gate.unlink()
            await until(lambda: len(station.processes) == 2 and station.processes[1].state == "ready")
            os.kill(spare, signal.SIGKILL)
            assert (await line.submit({"x": np.ones(1, np.float32)}))["pid"] == [pids()[2]]
        assert not station.processes
        assert not any(map(psutil.pid_exists, pids()))

    run(work)


def test_a_worker_is_told_its_card_and_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(opening._UNUSED, "run", ())  # a Python stage has no device: it is its own affair
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")

    async def work() -> None:
        async with Opened({"run": "surroundings", "device": "cuda:1", "memory_share": 0.25}) as line:
            assert (await line.submit({"x": np.ones(1, np.float32)}))["said"].tolist() == [b"6", b"0.25"]

    run(work)
