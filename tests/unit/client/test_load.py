"""The load generator counts what it should: right answers, wrong ones, faults, and the wait in an open loop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from tests.unit.protocols.running import Running, running
from torchship.cli.bench import command
from torchship.client.address import caller_context, parse
from torchship.client.load import CallOutcome, Target, closed_loop, example, open_loop
from torchship.client.report import render
from torchship.errors import BadConfig, BadInput, NotFound, StageFailed, Unavailable
from torchship.serve.api import rest
from torchship.serve.api.front import Front
from torchship.serve.http.listen import Listener


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    async def listen(front: Front) -> Listener:
        return await rest.listen(front, port=0)

    with running(listen) as found:
        yield found


@pytest.fixture(autouse=True)
def _calm(server: Running) -> Iterator[None]:
    yield
    server.service.fault, server.service.delay = None, 0.0


def target(server: Running, encoding: str = "binary", model: str = "echo") -> Target:
    scheme = "grpc" if encoding == "grpc" else "http"
    return Target(parse(f"{scheme}://127.0.0.1:{server.port}"), model, encoding, token="t")


@pytest.mark.parametrize("encoding", ["binary", "json", "grpc"])
def test_closed_loop(server: Running, encoding: str) -> None:
    aim = target(server, encoding)
    before = len(server.service.seen)

    async def main() -> CallOutcome:
        tensors = await example(aim, rows=3)
        assert tensors["x"].shape == (3, 16)
        return await closed_loop(aim, aim.payload(tensors), concurrency=4, seconds=0.2, warm_up=0.05)

    outcome = asyncio.run(main())
    assert not outcome.faults
    assert 10 < len(outcome.latencies) <= len(server.service.seen) - before
    assert 0 < outcome.percentile(50) <= outcome.percentile(99)
    assert outcome.rate == pytest.approx(len(outcome.latencies) / outcome.seconds)


@pytest.mark.parametrize("encoding", ["binary", "grpc"])
def test_large_requests(server: Running, encoding: str) -> None:
    aim = target(server, encoding)
    tensors = {"x": np.ones((20_000, 16), np.float32)}
    run: dict[str, Any] = {
        "concurrency": 2,
        "seconds": 0.3,
        "warm_up": 0.0,
        "check": lambda body: len(body) > 1_280_000,
    }
    outcome = asyncio.run(closed_loop(aim, aim.payload(tensors), **run))
    assert not outcome.faults
    assert outcome.latencies


@pytest.mark.parametrize("encoding", ["binary", "grpc"])
def test_faults_are_told_apart(server: Running, encoding: str) -> None:
    aim = target(server, encoding)
    payload = aim.payload({"x": np.ones((1, 16), np.float32)})
    server.service.fault = StageFailed("no")
    run: dict[str, Any] = {"concurrency": 2, "seconds": 0.1, "warm_up": 0.0}
    outcome = asyncio.run(closed_loop(aim, payload, **run))
    assert set(outcome.faults) == {"status 500" if encoding == "binary" else "grpc-status 13"}
    server.service.fault = None
    outcome = asyncio.run(closed_loop(aim, payload, check=lambda body: False, **run))
    assert set(outcome.faults) == {"wrong answer"}
    assert not outcome.latencies


def test_an_open_loop_counts_the_wait(server: Running) -> None:
    """One lane and 50 ms of work for each of 40 requests a second: the last one is due long before it is sent."""
    aim = target(server)
    payload = aim.payload({"x": np.ones((1, 16), np.float32)})
    server.service.delay = 0.05
    outcome = asyncio.run(open_loop(aim, payload, rate=40, seconds=0.5, lanes=1, patience=5.0))
    assert len(outcome.latencies) == 20
    assert max(outcome.latencies) > 0.2
    hasty = asyncio.run(open_loop(aim, payload, rate=40, seconds=0.5, lanes=1, patience=0.0))
    assert hasty.late > 0


def test_a_server_that_is_not_there() -> None:
    for encoding in ("binary", "grpc"):
        nowhere = Target(parse("127.0.0.1:1"), "echo", encoding)
        with pytest.raises(Unavailable, match="cannot connect"):
            asyncio.run(closed_loop(nowhere, b"", concurrency=1, seconds=0.1))


def test_examples_that_cannot_be(server: Running) -> None:
    with pytest.raises(BadInput, match="takes BYTES"):
        asyncio.run(example(target(server, model="picture")))
    with pytest.raises(NotFound, match="unknown model"):
        asyncio.run(example(target(server, model="none")))
    assert asyncio.run(example(target(server, model="picture"), file=b"x"))["image"].tolist() == [b"x"]
    with pytest.raises(BadConfig, match="cannot use none"):
        caller_context(authority="none.pem")


def test_what_meets_a_target() -> None:
    good = CallOutcome(1.0, [0.01] * 99 + [0.2])
    assert good.meets(percent=50, limit=0.02)
    assert not good.meets(percent=99.5, limit=0.02)
    good.faults["status 503"] += 1
    assert not good.meets(percent=50, limit=0.02)
    assert not CallOutcome().meets(percent=50, limit=1)


def test_the_page() -> None:
    rows = [
        CallOutcome(1.0, [0.001, 0.002], load="1 callers").plain(),
        CallOutcome(load="9/s", kind="open").plain(),
    ]
    page = render(rows, title="<x>")
    assert "&lt;x&gt;" in page
    assert page.count("<polyline") == 8
    assert "No run had an answer" in render(rows[1:], title="t")


def test_the_command(server: Running, tmp_path: Path) -> None:
    page = tmp_path / "load.html"
    url = f"http://127.0.0.1:{server.port}/echo"
    short = ["--seconds", "0.1", "--warm-up", "0"]
    done = CliRunner().invoke(command, [url, "--concurrency", "1,2", "--json", "--html", str(page), *short])
    assert done.exit_code == 0, done.output
    assert [run["load"] for run in json.loads(done.output)["runs"]] == ["1 callers", "2 callers"]
    assert page.read_text().startswith("<!doctype html>")
    swept = CliRunner().invoke(command, [url, "--sweep", "p50=1s", *short])
    assert "within p50=1s" in swept.output
    rated = CliRunner().invoke(command, [url.replace("http", "grpc"), "--rate", "50", *short])
    assert "50/s" in rated.output
    for wrong in (["--sweep", "fast"], ["--rate", "x"], ["--concurrency", "0"]):
        assert CliRunner().invoke(command, [url, *wrong]).exit_code == 2
    nameless: Any = CliRunner().invoke(command, [f"http://127.0.0.1:{server.port}"])
    assert isinstance(nameless.exception, BadConfig)
