"""HTTP/1.1 connections to one server: pooled, kept alive, each with one request at a time; and streams of events.

The events of the generate extension hold numbers and strings without their shapes: those follow from the model's
metadata, where one length at most is free.
"""

from __future__ import annotations

import asyncio
import math
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import msgspec

from torchship.client.address import Address
from torchship.errors import BadInput, StageFailed, TorchshipError, Unavailable, Unsupported
from torchship.tensors import Array
from torchship.wire.json_arrays import decode_json_data, encode_json_data
from torchship.wire.messages import Request, Response
from torchship.wire.oip_json import decode_response, encode_request
from torchship.wire.status import Status, error_of

_LINE = 1 << 22  # bytes of a head or of a line of an event stream
_JSON = "Content-Type: application/json\r\n"
_BY_GRPC = "ask by a grpc:// URL"


class HttpLink:
    """Speaks the Open Inference Protocol over HTTP."""

    def __init__(self, address: Address, *, tls: ssl.SSLContext | None, headers: Mapping[str, str], size: int) -> None:
        """At most `size` connections are open at a time; further requests wait for one."""
        self._address, self._tls = address, tls
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self._lines = f"Host: {address.netloc}\r\n{lines}"
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._room = asyncio.Semaphore(size)

    async def infer(self, request: Request) -> Response:
        """One inference. Raises what the status of the answer means."""
        body = encode_request(request)
        headers = f"Inference-Header-Content-Length: {body.header_length}\r\nContent-Type: application/octet-stream\r\n"
        path = f"{_path(request.model, request.version)}/infer"
        answer, found = await self._ask("POST", path, body.data, headers)
        length = found.get("inference-header-content-length", "")
        return decode_response(answer, header_length=int(length) if length.isdecimal() else None)

    async def stream(self, request: Request) -> AsyncIterator[Response]:
        """Every answer of a model that streams, by server-sent events."""
        about = await self.metadata(request.model, request.version)
        body = _encode_generate(request, inputs=about["inputs"])
        head = self._head("POST", f"{_path(request.model, request.version)}/generate_stream", len(body), _JSON)
        async with self._room:
            try:
                reader, writer = await self._connect()
                try:
                    writer.writelines((head, body))
                    status, headers = await _answer(reader)
                    if status >= 300:
                        raise _error(status, await _body(reader, headers), headers)
                    async for line in _lines(_pieces(reader)):
                        if line.startswith(b"data:"):
                            yield _decode_event(line[5:], outputs=about["outputs"])
                finally:
                    writer.transport.abort()
            except (OSError, EOFError, asyncio.LimitOverrunError, ValueError) as fault:
                raise self._silent(fault) from None

    async def metadata(self, model: str, version: str) -> dict[str, Any]:
        """The server's metadata, or a model's."""
        return await self._plain("GET", _path(model, version))

    async def ready(self, model: str, version: str) -> bool:
        """Whether the server, or a model, answers."""
        await self._ask("GET", f"{_path(model, version)}/ready" if model else "/v2/health/ready")
        return True

    async def statistics(self, model: str, version: str) -> dict[str, Any]:
        """Statistics of a model, or of all."""
        return await self._plain("GET", f"{_path(model, version)}/stats" if model else "/v2/models/stats")

    async def control(self, verb: str, model: str) -> None:
        """`load` or `unload` a model."""
        await self._ask("POST", f"/v2/repository/models/{quote(model, safe='')}/{verb}", b"{}", _JSON)

    async def _plain(self, method: str, path: str) -> dict[str, Any]:
        answer, _ = await self._ask(method, path)
        try:
            return msgspec.json.decode(answer, type=dict[str, Any])
        except msgspec.MsgspecError as fault:
            raise StageFailed(f"the server's answer cannot be read: {fault}") from None

    async def _ask(self, method: str, path: str, body: bytes = b"", headers: str = "") -> tuple[bytes, dict[str, str]]:
        """One exchange; the body and headers of a good answer. Raises Unavailable where nobody answers."""
        async with self._room:
            try:
                status, found, answer = await self._exchange(self._head(method, path, len(body), headers), body)
            except (OSError, EOFError, asyncio.LimitOverrunError, ValueError) as fault:
                raise self._silent(fault) from None
        if status >= 300:
            raise _error(status, answer, found)
        return answer, found

    def _head(self, method: str, path: str, size: int, headers: str) -> bytes:
        return f"{method} {path} HTTP/1.1\r\n{self._lines}{headers}Content-Length: {size}\r\n\r\n".encode()

    async def _exchange(self, head: bytes, body: bytes) -> tuple[int, dict[str, str], bytes]:
        while True:
            fresh = not self._idle
            reader, writer = await self._connect() if fresh else self._idle.pop()
            kept = False
            try:
                writer.writelines((head, body))  # not waited for: a server may refuse a body before it has all of it
                status, headers = await _answer(reader)
                answer = await _body(reader, headers)
                kept = headers.get("connection", "").lower() != "close"
                return status, headers, answer
            except (ConnectionError, asyncio.IncompleteReadError) as fault:
                if fresh or getattr(fault, "partial", None):
                    raise
                continue  # the server had closed a connection that was idle: that one never saw the request
            finally:
                if kept:
                    self._idle.append((reader, writer))
                else:
                    writer.transport.abort()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self._address.host, self._address.port, ssl=self._tls, limit=_LINE)

    def _silent(self, fault: Exception) -> Unavailable:
        return Unavailable(f"no answer from {self._address.netloc}: {fault}", hint="is it serving?")

    async def close(self) -> None:
        """Hang up."""
        idle, self._idle = self._idle, []
        for _, writer in idle:
            writer.transport.abort()  # TLS would go on to say good-bye after its loop has ended
        await asyncio.sleep(0)


def _path(model: str, version: str) -> str:
    if not model:
        return "/v2"
    return f"/v2/models/{quote(model, safe='')}" + (f"/versions/{quote(version, safe='')}" if version else "")


async def _answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status and headers of the final answer (RFC 9110 section 15.2: those of 1xx come before it)."""
    while True:
        first, _, rest = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").partition("\r\n")
        words = first.split(" ", 2)
        if len(words) < 2 or not words[0].startswith("HTTP/1.") or not words[1].isdecimal():
            raise EOFError("not an HTTP answer")
        if int(words[1]) >= 200:
            break
    headers = {}
    for line in rest.split("\r\n"):
        name, colon, value = line.partition(":")
        if colon:
            headers[name.strip().lower()] = value.strip()
    return int(words[1]), headers


async def _body(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> bytes:
    """The body of an answer; one without a length lasts until the end of the connection (RFC 9112 section 6.3)."""
    if headers.get("transfer-encoding", "").lower() == "chunked":
        return b"".join([piece async for piece in _pieces(reader)])
    if "content-length" not in headers and headers.get("connection", "").lower() == "close":
        return await reader.read()
    return await reader.readexactly(int(headers.get("content-length", "0")))


async def _pieces(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The chunks of a body (RFC 9112 section 7.1)."""
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)
    await reader.readuntil(b"\r\n")


async def _lines(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The lines of a text that comes in pieces."""
    parts: list[bytes] = []
    async for piece in pieces:
        first, *others = piece.split(b"\n")
        parts.append(first)
        for other in others:
            yield b"".join(parts)
            parts = [other]
    yield b"".join(parts)


def _error(status: int, body: bytes, headers: Mapping[str, str]) -> TorchshipError:
    try:
        text = str(msgspec.json.decode(body)["error"])
    except (msgspec.MsgspecError, KeyError, TypeError):
        text = body.decode(errors="replace")[:200] or f"status {status}"
    retry, code = headers.get("retry-after", ""), headers.get("grpc-status", "0")
    later = float(retry) if retry.isdecimal() else 0.0
    return error_of(Status(status, int(code) if code.isdecimal() else 0), text, retry_after=later)


def _encode_generate(request: Request, *, inputs: Sequence[Mapping[str, Any]]) -> bytes:
    """The JSON of a request. Raises BadInput for an unknown input, Unsupported for a shape that cannot be told."""
    known = {item["name"]: item["shape"] for item in inputs}
    fields: dict[str, Any] = {"parameters": request.parameters} | ({"id": request.id} if request.id else {})
    for name, array in request.inputs.items():
        if name not in known:
            raise BadInput(f"model {request.model!r} has no input {name!r}", hint=f"it has {', '.join(known)}")
        if name in ("id", "parameters") or _shape(known[name], array.size) != list(array.shape):
            raise Unsupported(f"input {name!r} of shape {list(array.shape)} cannot be sent to a stream", hint=_BY_GRPC)
        fields[name] = encode_json_data(array)
    return msgspec.json.encode(fields)


def _decode_event(line: bytes, *, outputs: Sequence[Mapping[str, Any]]) -> Response:
    """One answer out of its event. Raises StageFailed with the server's message where it holds an error."""
    try:
        told = msgspec.json.decode(line, type=dict[str, Any])
        if "error" in told:
            raise StageFailed(str(told["error"]))
        found = {item["name"]: _array(item, told[item["name"]]) for item in outputs if item["name"] in told}
        return Response(str(told["model_name"]), str(told.get("model_version", "")), found, str(told.get("id", "")))
    except (msgspec.MsgspecError, BadInput, KeyError) as fault:
        raise StageFailed(f"the server's event cannot be read: {fault}") from None


def _array(item: Mapping[str, Any], value: Any) -> Array:
    items = value if isinstance(value, list) else [value]
    shape = _shape(item["shape"], len(items))
    if shape is None:
        raise Unsupported(f"the shape of output {item['name']!r} cannot be told from an event", hint=_BY_GRPC)
    return decode_json_data(msgspec.json.encode(items), name=item["name"], datatype=item["datatype"], shape=shape)


def _shape(axes: Sequence[int], count: int) -> list[int] | None:
    """The shape of so many elements: the last free axis takes what the others, each of length 1, leave to it."""
    shape = [max(axis, 1) if axis else 0 for axis in axes]
    free = [place for place, axis in enumerate(axes) if axis < 0]
    if free:
        shape[free[-1]] = count // max(1, math.prod(shape))
    return shape if math.prod(shape) == count else None
