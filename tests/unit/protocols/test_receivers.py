"""Receivers: what they hand over arrives whole, who dies is replaced, and everything that was lent comes back."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.protocols.running import Running, WatchedService, receivers, run, running
from tests.unit.protocols.test_http1 import ASK, parts, post, status, talk
from tests.unit.protocols.test_tls import papers
from torchship.client import Client
from torchship.errors import Unavailable
from torchship.serve.api import rest
from torchship.serve.api.front import Front
from torchship.serve.http import pool as pools
from torchship.serve.http.handover import decode_from_receiver
from torchship.serve.http.listen import Listener
from torchship.serve.http.pool import ReceiverPool
from torchship.serve.http.receiver import Spans
from torchship.serve.http.site import ConnectionLimits
from torchship.serve.ipc.channel import Channel

__all__ = ["papers"]  # a fixture
READY = b"GET /v2/health/ready HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    async def listen(front: Front) -> Listener:
        return await rest.listen(front, port=0, receivers=await receivers("receivers"))

    with running(listen) as found:
        yield found


def rows(count: int, first: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    return (np.arange(count * 16, dtype=np.float32) + first).reshape(count, 16)


@pytest.mark.parametrize("count", [1, 63, 64, 65, 200, 4000, 100_000])
@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_bodies_of_every_size(server: Running, scheme: str, count: int) -> None:
    """In the message, in the receiver's memory as bytes and as a view; and answers of the same sizes."""
    with Client(f"{scheme}://127.0.0.1:{server.port}") as client:
        for first in (0, 7):
            assert np.array_equal(client.infer("echo", rows(count, first))["y"], rows(count, first))


def test_bodies_that_have_no_room_in_the_receivers_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "_MEMORY", 1 << 16)

    async def once(service: WatchedService) -> int:
        """Descriptors that are open after all is closed."""
        pool = await ReceiverPool(1).open()
        listener = await rest.listen(Front(service), port=0, receivers=pool)
        (receiver,) = pool.ready
        with Client(f"http://127.0.0.1:{listener.port}") as client:
            for count in (1023, 1024, 30_000, 500):
                found = await asyncio.to_thread(client.infer, "echo", rows(count))
                assert np.array_equal(found["y"], rows(count))
        service.seen.clear()
        await asyncio.sleep(1.1)  # what is not told with a request is told once a second
        assert not receiver._lent
        assert not receiver._open
        await listener.close()
        await pool.close()
        return len(os.listdir("/proc/self/fd"))

    async def main(service: WatchedService) -> None:
        first = await once(service)  # some are opened once for the whole process
        assert await once(service) == first

    run(main)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 3000)), max_size=60))
def test_no_byte_is_given_out_twice_and_all_come_back(steps: list[tuple[bool, int]]) -> None:
    spans, taken = Spans(8192), dict[int, int]()
    for give, size in steps:
        if give and taken:
            offset = [*taken][size % len(taken)]
            spans.give(offset)
            del taken[offset]
        elif (offset := spans.take(size)) >= 0:
            assert offset + size <= 8192
            assert all(offset + size <= at or at + long <= offset for at, long in taken.items())
            taken[offset] = size
    for offset in taken:
        spans.give(offset)
    assert spans.take(8192) == 0


def test_a_head_that_the_host_has_forgotten_is_told_again(server: Running) -> None:
    """Long heads are new each time; a short one is remembered by the receiver for longer than by the host."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as peer:
        for turn in range(2):
            peer.sendall(post(ASK))
            assert status(peer.recv(65536)) == 200
            for number in range(0 if turn else 4100):
                peer.sendall(READY[:-2] + b"X-Long: %d%s\r\n\r\n" % (number, b"a" * 2048))
                assert status(peer.recv(65536)) == 200


def test_a_receiver_that_is_killed_takes_its_own_connections_only(server: Running) -> None:
    """They are dealt out in turn, so that two connections are at two receivers."""

    async def main() -> None:
        pool = await receivers("receivers")
        assert pool is not None
        links = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(4)]
        for reader, writer in links:
            writer.write(READY)
            assert b"200" in await reader.readline()
        assert [one.connections for one in pool.ready] == [2, 2]
        server.service.delay = 5.0
        links[0][1].write(post(ASK))
        await asyncio.sleep(0.2)
        server.service.delay = 0.0
        victim = next(one for one in pool.ready if one._open)
        restarts, cancelled = pool.restarts, server.service.cancelled
        os.kill(victim.pid, signal.SIGKILL)
        for number, (reader, writer) in enumerate(links):
            mine = number % 2 == 0
            answer = b""
            try:
                while data := await asyncio.wait_for(reader.read(65536), 0.5 if not mine else 10):
                    answer += data
            except (TimeoutError, ConnectionError):
                pass
            if not mine:
                writer.write(READY)
                assert b"200" in await reader.readline()
            writer.close()
        assert pool.restarts == restarts + 1
        assert server.service.cancelled == cancelled + 1
        while len(pool.ready) < 2:
            await pool.wait()
        assert victim not in pool.ready

    server.run(main())
    assert talk(server, post(ASK), post(ASK)).count(b"HTTP/1.1 200 OK") == 2


def test_under_load_nobody_else_notices_a_kill(server: Running) -> None:
    """Who loses a connection asks again; every answer is right, and none is missing elsewhere."""
    over, seen = asyncio.Event(), [0, 0]

    async def caller(number: int) -> None:
        reader = writer = None
        while not over.is_set():
            ask = rows(300, number * 1000)
            x = {"name": "x", "shape": [300, 16], "datatype": "FP32", "parameters": {"binary_data_size": 19200}}
            head = json.dumps({"inputs": [x], "parameters": {"binary_data_output": True}}).encode()
            try:
                if reader is None or writer is None:
                    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
                writer.write(post(head + ask.tobytes(), f"Inference-Header-Content-Length: {len(head)}"))
                top = await reader.readuntil(b"\r\n\r\n")
                headers, _ = parts(top)
                body = await reader.readexactly(int(headers["content-length"]))
            except (ConnectionError, asyncio.IncompleteReadError):
                seen[1] += 1
                if writer is not None:
                    writer.close()
                reader = writer = None
                continue
            assert status(top) == 200
            assert body[int(headers["inference-header-content-length"]) :] == ask.tobytes()
            seen[0] += 1
        if writer is not None:
            writer.close()

    async def main() -> None:
        pool = await receivers("receivers")
        assert pool is not None
        callers = [asyncio.ensure_future(caller(number)) for number in range(8)]
        for _ in range(3):
            await asyncio.sleep(0.5)
            while len(pool.ready) < 2:
                await pool.wait()
            os.kill(pool.ready[0].pid, signal.SIGKILL)
        over.set()
        await asyncio.gather(*callers)
        for receiver in pool.ready:  # both at once
            os.kill(receiver.pid, signal.SIGKILL)
        while pool.ready:
            await pool.wait()
        while len(pool.ready) < 2:
            await pool.wait()
        assert len(pool._receivers) == 2

    server.run(main())
    assert seen[0] > 50
    assert seen[1] <= 3 * 8


def test_a_receiver_that_hangs_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "_SILENCE", 2.5)

    async def main(service: WatchedService) -> None:
        pool = await ReceiverPool(1).open()
        listener = await rest.listen(Front(service), port=0, receivers=pool)
        (receiver,) = pool.ready
        os.kill(receiver.pid, signal.SIGSTOP)
        while receiver in pool.ready:
            await asyncio.wait_for(pool.wait(), 20)
        reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)  # waits for the new one
        writer.write(READY)
        assert b"200" in await asyncio.wait_for(reader.readline(), 20)
        writer.close()
        await listener.close()
        await pool.close()

    run(main)


@pytest.mark.parametrize("said", [b"no list", b"\x91\x93\x02\x01\x05", b"\x91\x94\x02\x01\x05\xc4\x00"])
def test_what_breaks_the_protocol_ends_the_channel(said: bytes) -> None:
    """Not msgpack, too few fields, and a head that was never told: whoever listens goes on and is told of the end."""

    async def main() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ends: list[str] = []
        heads: dict[int, Any] = {}
        Channel(ours, decode=decode_from_receiver, on_event=lambda event, fd: heads[event.head](), on_end=ends.append)
        theirs.send(said)
        await asyncio.sleep(0.05)
        assert "broke the protocol" in ends[0]
        assert theirs.recv(10) == b""
        theirs.close()

    asyncio.run(main())


def test_a_pool_that_cannot_start() -> None:
    async def main(service: WatchedService) -> None:
        with pytest.raises(Unavailable, match="a receiver does not start"):
            await ReceiverPool(2, files=("none.pem", "none.key", "")).open()

    run(main)


def test_tls(papers: Path) -> None:
    files = str(papers / "server.pem"), str(papers / "server.key"), ""

    async def opened(service: WatchedService) -> ReceiverPool:
        return await ReceiverPool(1, files=files).open()

    pool = run(opened)

    async def listen(front: Front) -> Listener:
        return await rest.listen(front, port=0, receivers=pool)

    with running(listen) as found:
        context = ssl.create_default_context(cafile=str(papers / "ca.pem"))
        for scheme in ("https", "grpcs"):
            with Client(f"{scheme}://localhost:{found.port}", tls=context) as client:
                assert np.array_equal(client.infer("echo", rows(100))["y"], rows(100))
        with socket.create_connection(("127.0.0.1", found.port), timeout=10) as stranger:
            stranger.sendall(READY)
            assert stranger.recv(100)[:1] in (b"", b"\x15")  # an alert, or nothing
        until = time.monotonic() + 10
        while pool.ready[0].connections:  # who has left, and who never got in, are counted out
            assert time.monotonic() < until
            time.sleep(0.02)
    run(lambda service: pool.close())


def test_a_port_in_use_is_told(server: Running) -> None:
    async def main(service: WatchedService) -> None:
        with pytest.raises(Unavailable, match="cannot listen"):
            await rest.listen(Front(service), port=server.port, receivers=await receivers("receivers"))

    run(main)


def test_all_bodies_together_are_bounded() -> None:
    """The limit is shared out to the receivers."""

    async def main(service: WatchedService) -> None:
        pool = await receivers("receivers")
        limits = ConnectionLimits(bodies=100_000)
        listener = await rest.listen(Front(service), port=0, limits=limits, receivers=pool)
        half = post(bytes(60_000))[:40_000]
        links = [await asyncio.open_connection("127.0.0.1", listener.port) for _ in range(4)]
        for _, writer in links:
            writer.write(half)
            await asyncio.sleep(0.05)
        answers = [await asyncio.wait_for(reader.read(), 10) for reader, _ in links[2:]]
        assert all(b"503 Service Unavailable" in answer for answer in answers)
        for _, writer in links:
            writer.close()
        await listener.close(grace=0.2)

    run(main)
