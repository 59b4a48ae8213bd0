"""Clients as other people use them: after a fork, with silent servers, odd arrays, bodies that are too large."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from tests.unit.protocols.running import Running, running
from torchship.client import AsyncClient, Budget, Client
from torchship.errors import (
    BadConfig,
    BadInput,
    Busy,
    Cancelled,
    Denied,
    Expired,
    NotFound,
    StageFailed,
    TorchshipError,
    Unauthenticated,
    Unavailable,
    Unsupported,
)
from torchship.serve.api import rest
from torchship.serve.api.front import Front
from torchship.serve.http.exchange import HttpFault
from torchship.serve.http.site import ConnectionLimits
from torchship.tensors import bytes_array

ROW = np.arange(16, dtype=np.float32).reshape(1, 16)
BOTH = pytest.mark.parametrize("scheme", ["http", "grpc"])


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    async def listen(front: Front) -> Any:
        return await rest.listen(front, port=0, limits=ConnectionLimits(max_body=1 << 20))

    with running(listen) as found:
        yield found


@pytest.fixture(scope="module")
def silent() -> Iterator[int]:
    """The port of a server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken: list[socket.socket] = []

        def take() -> None:
            with suppress(OSError):
                while True:
                    taken.append(listener.accept()[0])

        thread = threading.Thread(target=take, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)
        for one in taken:
            one.close()


def url(scheme: str, port: int) -> str:
    return f"{scheme}://127.0.0.1:{port}"


FORKED = """
import os, sys, asyncio
import numpy as np
from torchship.client import AsyncClient, Client
from torchship.errors import Unavailable

client = Client(sys.argv[1], timeout=10.0)
row = np.zeros((1, 16), np.float32)
assert (client.infer("echo", row)["y"] == row).all()
children = []
for number in (1, 2):
    pid = os.fork()
    if not pid:
        try:
            good = all((client.infer("echo", row + number * 100 + n)["y"] == row + number * 100 + n).all()
                       for n in range(50))
            client.close()
            os._exit(0 if good else 2)
        except BaseException as fault:
            print(repr(fault), flush=True)
            os._exit(3)
    children.append(pid)
assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0]
assert (client.infer("echo", row + 7)["y"] == row + 7).all()
client.close()

async def main():
    async with AsyncClient(sys.argv[1]) as own:
        await own.metadata()
        pid = os.fork()
        if not pid:
            try:
                own._within(own.metadata()).send(None)
            except Unavailable as fault:
                os._exit(0 if "forked" in str(fault) else 2)
            os._exit(3)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

asyncio.run(main())
print("good")
"""


@BOTH
def test_a_forked_child_gets_answers_of_its_own(server: Running, scheme: str) -> None:
    words = [sys.executable, "-c", FORKED, url(scheme, server.port)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "good"), done.stderr


@BOTH
def test_time_outs_are_kept_by_every_call(silent: int, scheme: str) -> None:
    words = {"text_input": np.array([b"a"], object)}
    with Client(url(scheme, silent), timeout=0.3, budget=Budget(tries=1)) as client:
        assert not client.ready()
        calls: list[Any] = [
            client.metadata,
            client.statistics,
            lambda: client.infer("m", {"x": ROW}),
            lambda: client.infer("m", ROW),
            lambda: client.load("m", timeout=0.3),
            lambda: next(client.stream("m", words)),
        ]
        for call in calls:
            with pytest.raises(Expired, match=r"within 0\.3 s|Deadline"):
                call()


def test_a_client_that_is_closed_says_so(server: Running) -> None:
    client = Client(url("http", server.port))
    client.close()
    with pytest.raises(Unavailable, match="closed"):
        client.metadata()


@BOTH
@pytest.mark.parametrize(
    "fault",
    [
        BadInput("x"), BadConfig("x"), NotFound("x"), Unsupported("x"), Unauthenticated("x"), Denied("x"),
        Busy("x", retry_after=3.0), Expired("x"), Cancelled("x"), Unavailable("x"), StageFailed("x"), ValueError("x"),
    ],
    ids=lambda fault: type(fault).__name__,
)  # fmt: skip
def test_one_fault_is_one_error_in_every_client(server: Running, scheme: str, fault: Exception) -> None:
    same: dict[type[Exception], type[TorchshipError]] = {BadConfig: BadInput, ValueError: StageFailed}
    server.service.fault = fault
    try:
        with Client(url(scheme, server.port), budget=Budget(tries=1)) as client:
            with pytest.raises(TorchshipError) as caught:
                client.infer("echo", ROW)
            assert type(caught.value) is same.get(type(fault), type(fault))
            assert getattr(caught.value, "retry_after", 0) == getattr(fault, "retry_after", 0)
    finally:
        server.service.fault = None


@BOTH
def test_what_is_too_large_is_told_and_not_sent_again(server: Running, scheme: str) -> None:
    with Client(url(scheme, server.port)) as client:
        for rows in (40_000, 400_000):
            with pytest.raises(BadInput, match="1048576"):
                client.infer("echo", np.zeros((rows, 16), np.float32))
        assert (client.infer("echo", ROW)["y"] == ROW).all()


@BOTH
def test_arrays_of_any_kind_arrive_as_their_values(server: Running, scheme: str) -> None:
    with Client(url(scheme, server.port)) as client:
        wide = np.arange(64, dtype=">f4").reshape(4, 16)
        for array in (wide, wide[::-2], np.asfortranarray(wide), np.broadcast_to(wide[:1], (4, 16))):
            assert client.infer("echo", {"x": array})["y"].tolist() == array.tolist()
        for given in ([b"a\0"], ["a\0"], np.array(["a\0"], object), bytes_array([bytearray(b"a\0")])):
            assert client.infer("text", {"text_input": given})["text_output"].tolist() == [b"A\0"]  # type: ignore[dict-item]
        for wrong in (np.array([3], object), np.array([1.5], object), np.array(["\ud800"], object)):
            with pytest.raises(BadInput, match="a BYTES element"):
                client.infer("text", {"text_input": wrong})
        with pytest.raises(BadInput, match="masked"):
            client.infer("echo", {"x": np.ma.masked_array(ROW, ROW > 3)})


@pytest.mark.parametrize("headers", [{"a": "b\r\nc: d"}, {"a\n": "b"}, {"a": "é"}])
def test_headers_that_cannot_be_sent(headers: dict[str, str]) -> None:
    with pytest.raises(BadConfig, match="cannot be sent"):
        Client("http://127.0.0.1:1", headers=headers)


def test_names_are_never_more_than_names(server: Running) -> None:
    async def main() -> None:
        async with AsyncClient(url("http", server.port)) as client:
            for name in ("no such", "a/../b", "a\r\nx: y"):
                with pytest.raises((NotFound, BadInput)):
                    await client.infer(name, {"x": ROW})

    asyncio.run(main())


def test_a_fault_of_http_itself_keeps_its_meaning(server: Running) -> None:
    server.service.fault = HttpFault(429, "slow down")
    try:
        with Client(url("http", server.port), budget=Budget(tries=1)) as client, pytest.raises(Busy):
            client.infer("echo", ROW)
    finally:
        server.service.fault = None
