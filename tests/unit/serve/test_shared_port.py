"""Several servers at one port: each answers there, and at a port of its own."""

from __future__ import annotations

import asyncio

import pytest
import uvloop

from torchship.errors import Unavailable
from torchship.serve import config as configs
from torchship.serve.host import Server


async def asked(port: int) -> bytes:
    """The first line of the answer to a question about readiness."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /v2/health/ready HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    line = await reader.readline()
    writer.close()
    await writer.wait_closed()
    return line


def test_servers_share_a_port_and_each_has_its_own() -> None:
    async def work() -> None:
        def server(port: int, *, shared: bool = True) -> Server:
            return Server(configs.convert({"http": {"port": port, "shared": shared, "own_port": 0}}))

        one = await server(0).open()
        assert one.http is not None
        two = await server(one.http.port).open()
        try:
            assert two.http is not None
            assert two.http.port == one.http.port
            assert one.own is not None
            assert two.own is not None
            for port in (one.http.port, one.own.port, two.own.port):
                assert await asked(port) == b"HTTP/1.1 200 OK\r\n"
            with pytest.raises(Unavailable, match="cannot listen"):
                await server(one.http.port, shared=False).open()
            port = one.http.port
            await one.close()
            assert await asked(port) == b"HTTP/1.1 200 OK\r\n"
        finally:
            await two.close()

    uvloop.run(work())
