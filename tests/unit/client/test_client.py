"""Our own clients against our own front doors: both protocols, both styles, retries, streams, errors."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from tests.unit.protocols.running import STREAMS, Running, running
from torchship.client import AsyncClient, Budget, Client
from torchship.client.address import parse
from torchship.errors import (
    BadConfig,
    BadInput,
    Busy,
    Denied,
    Expired,
    NotFound,
    StageFailed,
    Unavailable,
    Unsupported,
)
from torchship.serve.api import rest
from torchship.serve.api.front import Front
from torchship.wire.messages import Request

ROW = np.arange(16, dtype=np.float32).reshape(1, 16)


@dataclass
class Doors:
    """Both URLs of one server."""

    running: Running
    urls: dict[str, str]


@pytest.fixture(scope="module")
def doors() -> Iterator[Doors]:
    found: dict[str, Any] = {}

    def admit(scope: str, headers: Any) -> None:
        if scope == "manage" and headers.get("authorization") != "Bearer boss":
            raise Denied("model control needs a token")

    async def listen(front: Front) -> Any:
        found["grpc"] = await rest.listen(front, port=0, grpc_only=True, admit=admit)
        return await rest.listen(front, port=0, admit=admit)

    with running(listen) as server:
        urls = {"http": f"http://127.0.0.1:{server.port}", "grpc": f"grpc://127.0.0.1:{found['grpc'].port}"}
        yield Doors(server, urls)
        server.run(found["grpc"].close(grace=1))


@pytest.fixture(params=["http", "grpc"])
def client(request: pytest.FixtureRequest, doors: Doors) -> Iterator[Client]:
    with Client(doors.urls[request.param], timeout=20, budget=Budget(tries=1)) as found:
        yield found
    doors.running.service.fault, doors.running.service.delay = None, 0.0


def test_numpy_in_numpy_out(client: Client, doors: Doors) -> None:
    assert client.ready()
    assert client.ready("echo")
    assert not client.ready("none")
    assert (client.infer("echo", ROW)["y"] == ROW).all()
    named = {"INPUT0": ROW.astype(np.int32), "INPUT1": ROW.astype(np.int32)}
    both = client.infer(
        "add_sub", named, outputs=["OUTPUT1"], version="1", request_id="r", priority=2, parameters={"a": 1.5}
    )
    assert list(both) == ["OUTPUT1"]
    seen = doors.running.service.seen[-1]
    assert (seen.id, seen.priority, seen.parameters) == ("r", 2, {"a": 1.5})
    assert 0 < seen.deadline <= 20
    text = client.infer("text", {"text_input": np.array([b"abc"], object)})
    assert text["text_output"].tolist() == [b"ABC"]


def test_large_tensors(client: Client) -> None:
    rows = np.random.default_rng(0).random((60_000, 16), np.float32)
    assert (client.infer("echo", rows)["y"] == rows).all()


def test_many_at_a_time_and_from_many_threads(client: Client) -> None:
    answers = client.infer_many("echo", [ROW + number for number in range(200)])
    assert all((answer["y"] == ROW + number).all() for number, answer in enumerate(answers))
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(20):
            if not (client.infer("echo", ROW * number)["y"] == ROW * number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert wrong == []


def test_metadata_and_control(client: Client, doors: Doors, request: pytest.FixtureRequest) -> None:
    assert client.metadata()["name"] == "triton"
    assert client.metadata("echo")["inputs"][0] == {"name": "x", "datatype": "FP32", "shape": [-1, 16]}
    assert client.statistics("echo")["model_stats"][0]["name"] == "echo"
    with pytest.raises(Denied, match="token"):
        client.unload("text")
    url = doors.urls[request.node.callspec.params["client"]]
    with Client(url, token="boss") as boss:
        boss.unload("text")
        assert not client.ready("text")
        boss.load("text")
    assert client.ready("text")


def test_errors_come_back_as_they_were(client: Client, doors: Doors) -> None:
    with pytest.raises(NotFound, match="unknown model"):
        client.infer("none", {"x": ROW})
    with pytest.raises(BadInput, match="axis 1 is 15"):
        client.infer("echo", ROW[:, :15])
    with pytest.raises(BadInput, match="has 2 inputs"):
        client.infer("add_sub", ROW)
    for fault, kind in (
        (StageFailed("it broke"), StageFailed),
        (ValueError("x"), StageFailed),
        (Expired("late"), Expired),
        (Busy("full", retry_after=90.0), Busy),
        (Unsupported("streams"), Unsupported),
    ):
        doors.running.service.fault = fault
        with pytest.raises(kind) as caught:
            client.infer("echo", ROW)
        if isinstance(fault, Busy):
            assert caught.value.retry_after == 90.0  # type: ignore[attr-defined]
    doors.running.service.fault = None
    doors.running.service.delay = 5.0
    with pytest.raises(Expired):
        client.infer("echo", ROW, timeout=0.2)


def test_streams(doors: Doors) -> None:
    words = {"text_input": np.array([b"abc"], object)}
    for url in doors.urls.values():
        with Client(url) as client:
            answers = list(client.stream(STREAMS, words, parameters={"count": 3}))
            assert [answer["text_output"].tolist() for answer in answers] == [[b"ABC"]] * 3
            first = next(iter(client.stream(STREAMS, words, parameters={"count": 1000})))
            assert first["text_output"][0] == b"ABC"
            with pytest.raises((StageFailed, NotFound), match="unknown model"):
                list(client.stream("none", words))
            (sums,) = client.stream("echo", ROW)
            assert (sums["y"] == ROW).all()
    with Client(doors.urls["http"]) as client, pytest.raises(Unsupported, match="to a stream"):
        next(client.stream("echo", np.zeros((2, 2, 8), np.float32)))


def test_asyncio(doors: Doors) -> None:
    async def main() -> None:
        for url in doors.urls.values():
            async with AsyncClient(url, connections=4) as client:
                answers = await asyncio.gather(*(client.infer("echo", ROW + number) for number in range(50)))
                assert all((answer["y"] == ROW + number).all() for number, answer in enumerate(answers))

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_a_busy_server_is_asked_again(doors: Doors, kind: str) -> None:
    service = doors.running.service
    refused: list[Request] = []
    plain = service.start

    def busy(request: Request, *answer: Any) -> Any:
        if len(refused) < 2:
            refused.append(request)
            raise Unavailable("not yet")
        return plain(request, *answer)

    service.start = busy  # type: ignore[assignment,method-assign]
    try:
        with Client(doors.urls[kind], budget=Budget(tries=5, first_pause=0.01)) as client:
            assert (client.infer("echo", ROW)["y"] == ROW).all()
            assert len(refused) == 2
    finally:
        del service.start


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_nobody_is_there(kind: str) -> None:
    with Client(f"{kind}://127.0.0.1:1", budget=Budget(tries=2, first_pause=0.01)) as client:
        assert not client.ready()
        with pytest.raises(Unavailable, match=r"no answer from 127\.0\.0\.1:1"):
            client.infer("m", {"x": ROW})


def test_the_budget() -> None:
    budget = Budget(tries=100, tokens=1.0, first_pause=0.1, longest_pause=0.3)
    down = Unavailable("down")
    first = budget.pause(down, attempt=1, left=10)
    assert first is not None
    assert 0.05 <= first <= 0.1
    assert budget.pause(BadInput("no"), attempt=1, left=10) is None
    assert budget.pause(down, attempt=3, left=10) is None  # the reserve is gone
    for _ in range(20):
        budget.request()
    busy = Busy("full", retry_after=2.0)
    assert budget.pause(busy, attempt=1, left=10) == 2.0
    assert Budget().pause(busy, attempt=1, left=1.0) is None
    assert Budget(tries=2).pause(down, attempt=2, left=10) is None


def test_addresses() -> None:
    assert parse("host:9").port == 9
    assert parse("grpcs://h").secure
    assert parse("grpc://h/m").model == "m"
    assert parse("http://h/v2/models/m").model == "m"
    for wrong in ("ftp://h", "http://", "http://h:x", ""):
        with pytest.raises(BadConfig, match="not a URL"):
            parse(wrong)
