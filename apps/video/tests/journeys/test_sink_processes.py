"""Sinks as the flow uses them: in processes that are slow, dead, killed, or whose receiver is away."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import av
import pytest
from apps.video.tests.sink_kit import CROSSED, Receiver, frame, observed, ring, running, until

from torchship_video.messages import Observation
from torchship_video.sinks import SinkConfig
from torchship_video.sinks.runner import SinkRunner


def go(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 120))


def lines(path: Path) -> list[int]:
    """The sequence numbers of a file of JSON Lines."""
    return [json.loads(line)["sequence"] for line in path.read_text().splitlines()]


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_all_that_was_offered_is_written_before_the_end(tmp_path: Path) -> None:
    async def work() -> None:
        async with running(SinkRunner(SinkConfig(kind="jsonl", options={"path": str(tmp_path / "a")}))) as runner:
            for number in range(500):
                runner.offer(observed(number))

    go(work())
    assert lines(tmp_path / "a") == list(range(500))


def test_a_sink_that_is_killed_starts_again_and_a_torn_line_does_not_stay(tmp_path: Path) -> None:
    path = tmp_path / "a"

    async def work() -> None:
        runner = SinkRunner(SinkConfig(kind="jsonl", options={"path": str(path)}))
        before = open_files()
        async with running(runner):
            for killed in range(3):
                await until(lambda: runner.status().state == "running")
                runner.offer(observed(killed))
                assert await runner.settled(30)
                assert runner.pid is not None
                os.kill(runner.pid, signal.SIGKILL)
                with path.open("ab") as file:
                    file.write(b'{"torn')
                await until(lambda: runner.status().restarts == killed + 1)  # noqa: B023
                assert "SIGKILL" in runner.status().words
            await until(lambda: runner.status().state == "running")
            runner.offer(observed(9))
            assert await runner.settled(30)
        assert open_files() <= before + 2  # what the loop itself keeps

    go(work())
    assert lines(path) == [0, 1, 2, 9]


def test_a_dead_sink_never_blocks_and_drops_its_oldest(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("no folder")
    config = SinkConfig(kind="jsonl", queue=10, options={"path": str(tmp_path / "taken" / "a")})

    async def work() -> None:
        async with running(SinkRunner(config)) as runner:
            await until(lambda: runner.status().restarts >= 2)
            for number in range(100):
                runner.offer(observed(number))
            status = runner.status()
            assert (status.queued, status.dropped, status.written) == (10, 90, 0)
            assert status.state != "running"
            assert "NotADirectoryError" in status.words or "FileExistsError" in status.words
            (tmp_path / "taken").unlink()
            assert await runner.settled(40)  # mended, it goes on with what it kept

    go(work())
    assert lines(tmp_path / "taken" / "a") == list(range(90, 100))


def test_a_sink_that_hangs_does_not_stop_the_others(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "nobody-reads")
    reader = os.open(tmp_path / "nobody-reads", os.O_RDONLY | os.O_NONBLOCK)
    stuck = SinkConfig(kind="jsonl", queue=50, options={"path": str(tmp_path / "nobody-reads"), "max_mb": 0})

    async def work() -> None:
        async with (
            running(SinkRunner(stuck)) as one,
            running(SinkRunner(SinkConfig(kind="jsonl", options={"path": str(tmp_path / "a")}))) as other,
        ):
            await until(lambda: one.status().state == other.status().state == "running")
            for number in range(2000):  # more than a pipe holds
                one.offer(observed(number))
                other.offer(observed(number))
                if number % 100 == 0:
                    await other.settled(30)
            assert await other.settled(30)
            assert one.status().queued > 0
            assert one.status().dropped > 0

    go(work())
    os.close(reader)
    assert lines(tmp_path / "a") == list(range(2000))


def test_pixels_are_read_from_the_ring_and_what_is_gone_is_skipped(tmp_path: Path) -> None:
    async def work() -> None:
        with ring(slots=3) as publish:
            path = tmp_path / "{camera}.mp4"
            async with running(SinkRunner(SinkConfig(kind="mp4", options={"path": str(path)}))) as runner:
                await until(lambda: runner.status().state == "running")
                for number in range(4):
                    runner.offer(observed(at=publish(number)))
                    assert await runner.settled(30)
                old = publish(4)
                for number in range(5, 10):
                    last = publish(number)
                runner.offer(observed(at=old))
                runner.offer(Observation(frame(7)))  # of a ring that is gone
                runner.offer(observed(at=last))
                assert await runner.settled(30)
                assert (runner.status().written, runner.status().stale) == (5, 2)

    go(work())
    with av.open(str(tmp_path / "door.mp4")) as film:
        assert [round(float(shown.time), 1) for shown in film.decode(video=0)] == [0, 0.1, 0.2, 0.3, 0.9]


def test_a_film_whose_writer_was_killed_still_plays(tmp_path: Path) -> None:
    async def work() -> None:
        with ring() as publish:
            runner = SinkRunner(SinkConfig(kind="mp4", options={"path": str(tmp_path / "a.mp4")}))
            async with running(runner):
                await until(lambda: runner.status().state == "running")
                for number in range(130):
                    runner.offer(observed(at=publish(number)))
                    await runner.settled(30)
                assert runner.pid is not None
                os.kill(runner.pid, signal.SIGKILL)
                await until(lambda: runner.status().state == "running" and runner.status().restarts == 1)
                runner.offer(observed(at=publish(200)))
                await runner.settled(30)

    go(work())
    with av.open(str(tmp_path / "a.mp4")) as film:
        assert sum(1 for _ in film.decode(video=0)) >= 60  # whole fragments
    with av.open(str(tmp_path / "a-2.mp4")) as film:
        assert sum(1 for _ in film.decode(video=0)) == 1


def test_what_a_sink_makes_comes_back() -> None:
    pictures: list[tuple[str, bytes]] = []

    async def work() -> None:
        with ring() as publish:
            config = SinkConfig(kind="mjpeg", camera="door")
            async with running(SinkRunner(config, on_output=lambda *found: pictures.append(found))) as runner:
                runner.offer(observed(0, camera="yard"))  # not its camera
                assert runner.status().queued == 0
                runner.offer(observed(at=publish(1)))
                await until(lambda: bool(pictures))

    go(work())
    camera, data = pictures[0]
    assert camera == "door"
    assert data[:2] == b"\xff\xd8"


def test_a_webhook_survives_its_receiver_and_a_kill(tmp_path: Path) -> None:
    receiver = Receiver()
    port = receiver.port
    receiver.close()
    options = {"url": f"http://ann:pass@127.0.0.1:{port}/hook?a=1", "secret": "key", "spool": str(tmp_path / "spool")}

    async def work() -> None:
        nonlocal receiver
        runner = SinkRunner(SinkConfig(kind="webhook", options=options))
        async with running(runner):
            for number in range(5):
                runner.offer(observed(number, events=CROSSED))
                runner.offer(observed(100 + number))  # nothing happened: not sent
            await until(lambda: runner.status().facts.get("spooled") == 5)
            assert runner.pid is not None
            os.kill(runner.pid, signal.SIGKILL)
            await until(lambda: runner.status().restarts == 1)
            receiver = Receiver(port)
            receiver.answers = [503, 429]
            await until(lambda: len(receiver.taken) == 5)
            await until(lambda: runner.status().facts.get("spooled") == 0)

    go(work())
    receiver.close()
    assert [json.loads(body)["sequence"] for _, body in receiver.taken] == [0, 1, 2, 3, 4]
    headers = receiver.taken[0][0]
    assert headers["authorization"] == "Basic YW5uOnBhc3M="
    assert headers["x-torchship-signature"].startswith("t=")
    assert len({found["x-torchship-delivery"] for found, _ in receiver.taken}) == 5


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[int]:
    """Debian's mosquitto on a free port."""
    path = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")
    if path is None or shutil.which("mosquitto_sub") is None:
        pytest.skip("mosquitto and mosquitto-clients are not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = tmp_path / "mosquitto.conf"
    config.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\n")
    child = subprocess.Popen([path, "-c", str(config)], stderr=subprocess.DEVNULL)
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    yield port
    child.terminate()
    child.wait()


def test_a_broker_gets_events_also_after_a_kill(broker: int) -> None:
    pytest.importorskip("paho.mqtt.client")
    words = ["mosquitto_sub", "-p", str(broker), "-t", "torchship/#", "-q", "1", "-C", "2", "-W", "60", "-v"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as reader:
        time.sleep(0.5)  # it has subscribed

        async def work() -> None:
            runner = SinkRunner(SinkConfig(kind="mqtt", options={"port": broker}))
            async with running(runner):
                runner.offer(observed(1, events=CROSSED))
                runner.offer(observed(2))
                assert await runner.settled(30)
                assert runner.pid is not None
                os.kill(runner.pid, signal.SIGKILL)
                runner.offer(observed(3, events=CROSSED, camera="back/+"))
                assert await runner.settled(30)
                assert runner.status().restarts == 1

        go(work())
        out, _ = reader.communicate(timeout=60)
    topics, bodies = zip(*(line.split(" ", 1) for line in out.splitlines()), strict=True)
    assert topics == ("torchship/door", "torchship/back__")
    assert [json.loads(body)["sequence"] for body in bodies] == [1, 3]


def test_a_broker_that_is_away_is_told_in_words() -> None:
    pytest.importorskip("paho.mqtt.client")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    async def work() -> None:
        async with running(SinkRunner(SinkConfig(kind="mqtt", options={"port": port}))) as runner:
            await until(lambda: runner.status().restarts > 0)
            assert f"127.0.0.1:{port} cannot be reached" in runner.status().words

    go(work())
