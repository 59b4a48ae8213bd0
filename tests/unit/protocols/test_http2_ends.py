"""HTTP/2: what comes on a stream after its end, by whoever ended it (RFC 9113 section 5.1)."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tests.unit.protocols.peer import Peer
from tests.unit.protocols.running import WAYS, Running, receivers, running
from torchship.serve.api import rest
from torchship.serve.api.front import Front
from torchship.serve.http.site import ConnectionLimits
from torchship.wire import frames as h2


@pytest.fixture(scope="module", params=WAYS)
def server(request: pytest.FixtureRequest) -> Iterator[Running]:
    async def listen(front: Front) -> Any:
        limits, pool = ConnectionLimits(max_body=300_000), await receivers(request.param)
        return await rest.listen(front, port=0, grpc_only=True, limits=limits, receivers=pool)

    with running(listen) as found:
        yield found


@pytest.mark.parametrize("kind", ["data", "headers", "smaller", "after reset"])
def test_frames_after_the_end_of_a_stream(server: Running, kind: str) -> None:
    """RFC 9113 section 5.1: whoever has said all, or taken it back, cannot go on."""
    with Peer(server) as peer:
        peer.send(peer.call(5) if kind != "after reset" else peer.headers(5) + h2.reset(5, h2.CANCEL))
        if kind != "after reset":
            assert peer.status(5)["grpc-status"] == "0"
        more = {"headers": peer.headers(5), "smaller": peer.headers(3)}
        peer.send(more.get(kind, h2.frame(h2.DATA, h2.END_STREAM, 5, b"more")))
        _, payload = peer.until(h2.GOAWAY)
        assert int.from_bytes(payload[4:8], "big") == h2.STREAM_CLOSED


def test_frames_on_their_way_to_a_stream_that_we_closed(server: Running) -> None:
    with Peer(server) as peer:
        peer.send(peer.headers(1, "/inference.GRPCInferenceService/ModelStreamInfer"))
        peer.send(h2.frame(h2.DATA, 0, 1, b"\0" + (1 << 20).to_bytes(4, "big")))  # more than is taken
        assert peer.status(1)["grpc-status"] == "8"
        peer.send(h2.frame(h2.DATA, 0, 1, bytes(500)) + h2.frame(h2.DATA, h2.END_STREAM, 1, bytes(5)))
        peer.send(peer.call(3))
        assert peer.status(3)["grpc-status"] == "0"


def test_who_sends_no_more_is_answered_and_then_closed(server: Running) -> None:
    """A half-closed connection gets the answers to all that it asked in full (as RFC 9112 section 9.6 has it)."""
    with Peer(server) as peer:
        peer.send(peer.call(1) + peer.call(3) + peer.headers(5))
        peer.socket.shutdown(socket.SHUT_WR)
        ended = [number for kind, flags, number, _ in peer.frames() if kind == h2.HEADERS and flags & h2.END_STREAM]
    assert ended == [1, 3]
