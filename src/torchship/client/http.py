"""HTTP/1.1 connections to one server: pooled, kept alive, each with one request at a time."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping
from typing import Any

import msgspec

from torchship.client.address import Address
from torchship.client.events import decode_event, encode_generate
from torchship.errors import StageFailed, TorchshipError, Unavailable
from torchship.wire.asking import decode_http, encode_http
from torchship.wire.messages import Request, Response
from torchship.wire.status import Status, error_of

_HEAD_LIMIT = 1 << 16


class HttpLink:
    """Speaks the Open Inference Protocol over HTTP."""

    def __init__(self, address: Address, *, tls: ssl.SSLContext | None, headers: Mapping[str, str], size: int) -> None:
        """At most `size` connections are open at a time; further requests wait for one."""
        self._address, self._tls = address, tls
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self._lines = f"Host: {address.host}:{address.port}\r\n{lines}"
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._room = asyncio.Semaphore(size)

    async def infer(self, request: Request) -> Response:
        """One inference. Raises what the status of the answer means."""
        version = f"/versions/{request.version}" if request.version else ""
        body = encode_http(request)
        headers = f"Inference-Header-Content-Length: {body.header_length}\r\nContent-Type: application/octet-stream\r\n"
        answer, found = await self.ask("POST", f"/v2/models/{request.model}{version}/infer", body.data, headers)
        length = found.get("inference-header-content-length")
        return decode_http(answer, header_length=int(length) if length else None)

    async def stream(self, request: Request, about: Mapping[str, Any]) -> AsyncIterator[Response]:
        """Every answer of a model that streams, by server-sent events; `about` is the model's metadata."""
        version = f"/versions/{request.version}" if request.version else ""
        body = encode_generate(request, inputs=about["inputs"])
        head = f"POST /v2/models/{request.model}{version}/generate_stream HTTP/1.1\r\n{self._lines}"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        async with self._room:
            try:
                reader, writer = await self._connect()
                try:
                    writer.write(head.encode() + body)
                    status, headers = _head(await reader.readuntil(b"\r\n\r\n"))
                    if status >= 300:
                        raise _error(status, await _body(reader, headers), headers)
                    async for line in _lines(_pieces(reader)):
                        if line.startswith(b"data:"):
                            yield decode_event(line[5:], outputs=about["outputs"])
                finally:
                    writer.transport.abort()
            except (OSError, EOFError, asyncio.LimitOverrunError) as fault:
                raise self._silent(fault) from None

    def _silent(self, fault: Exception) -> Unavailable:
        where = f"{self._address.host}:{self._address.port}"
        return Unavailable(f"no answer from {where}: {fault}", hint="is it serving?")

    async def plain(self, method: str, path: str, value: Any = None) -> Any:
        """A call with JSON in and out; an empty answer is None."""
        body = b"" if value is None else msgspec.json.encode(value)
        answer, _ = await self.ask(method, path, body, "Content-Type: application/json\r\n" if body else "")
        return msgspec.json.decode(answer) if answer else None

    async def ask(self, method: str, path: str, body: bytes, headers: str = "") -> tuple[bytes, dict[str, str]]:
        """One exchange; the body and headers of a good answer. Raises Unavailable where nobody answers."""
        text = f"{method} {path} HTTP/1.1\r\n{self._lines}{headers}Content-Length: {len(body)}\r\n\r\n".encode()
        async with self._room:
            try:
                status, found, answer = await self._exchange(text + body)
            except (OSError, EOFError, asyncio.LimitOverrunError) as fault:
                raise self._silent(fault) from None
        if status >= 300:
            raise _error(status, answer, found)
        return answer, found

    async def _exchange(self, data: bytes) -> tuple[int, dict[str, str], bytes]:
        while True:
            fresh = not self._idle
            reader, writer = await self._connect() if fresh else self._idle.pop()
            kept = False
            try:
                writer.write(data)
                await writer.drain()
                top = await reader.readuntil(b"\r\n\r\n")
                status, headers = _head(top)
                body = await _body(reader, headers)
                kept = headers.get("connection", "").lower() != "close"
                return status, headers, body
            except (ConnectionError, EOFError):
                if fresh:
                    raise
                continue  # the server had closed a connection that was idle: that one never saw the request
            finally:
                if kept:
                    self._idle.append((reader, writer))
                else:
                    writer.transport.abort()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(
            self._address.host, self._address.port, ssl=self._tls, limit=1 << 22,
        )  # fmt: skip

    async def close(self) -> None:
        """Hang up."""
        idle, self._idle = self._idle, []
        for _, writer in idle:
            writer.transport.abort()  # TLS would go on to say good-bye after its loop has ended
        await asyncio.sleep(0)


def _head(top: bytes) -> tuple[int, dict[str, str]]:
    first, _, rest = top.decode("latin-1").partition("\r\n")
    words = first.split(" ", 2)
    if len(words) < 2 or not words[0].startswith("HTTP/1.") or not words[1].isdigit():
        raise EOFError("not an HTTP answer")
    headers = {}
    for line in rest.split("\r\n"):
        name, colon, value = line.partition(":")
        if colon:
            headers[name.strip().lower()] = value.strip()
    return int(words[1]), headers


async def _body(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> bytes:
    if headers.get("transfer-encoding", "").lower() == "chunked":
        return b"".join([piece async for piece in _pieces(reader)])
    return await reader.readexactly(int(headers.get("content-length", "0")))


async def _pieces(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The chunks of a body."""
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)
    await reader.readuntil(b"\r\n")


async def _lines(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The lines of a text that comes in pieces."""
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line
    if rest:
        yield rest


def _error(status: int, body: bytes, headers: Mapping[str, str]) -> TorchshipError:
    try:
        text = str(msgspec.json.decode(body)["error"])
    except (msgspec.MsgspecError, KeyError, TypeError):
        text = body.decode(errors="replace")[:200] or f"status {status}"
    retry = headers.get("retry-after", "")
    if status >= 500 and status not in (501, 503):
        return StageFailed(text)
    return error_of(Status(status, 0), text, retry_after=float(retry) if retry.isdigit() else 0.0)
