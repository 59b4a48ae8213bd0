"""gRPC to one server: many calls at a time on one connection of HTTP/2."""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import AsyncIterator, Mapping
from typing import Any, cast
from urllib.parse import unquote

import hpack

from torchship.client.address import Address
from torchship.errors import Busy, Expired, TorchshipError, Unavailable
from torchship.wire import frames as h2
from torchship.wire.asking import decode_grpc, decode_grpc_stream, encode_grpc
from torchship.wire.messages import Request, Response
from torchship.wire.schema import message
from torchship.wire.status import Status, error_of

_SERVICE = "/inference.GRPCInferenceService/"
_WINDOW = 1 << 24


class _Call:
    """One call: what is still to be sent, and what came."""

    __slots__ = ("body", "done", "fields", "fresh", "number", "out", "window")

    def __init__(self, number: int, window: int, done: asyncio.Future[None]) -> None:
        self.number, self.window, self.done = number, window, done
        self.out: deque[tuple[bytes, bool]] = deque()
        self.body = bytearray()
        self.fields: dict[str, str] = {}
        self.fresh = asyncio.Event()


class _Connection(asyncio.Protocol):
    """A connection of HTTP/2, seen from the client."""

    def __init__(self) -> None:
        self.calls: dict[int, _Call] = {}
        self.open = True
        self._last = -1
        self._encoder, self._decoder = hpack.Encoder(), hpack.Decoder()
        self._buffer = b""
        self._window, self._initial, self._frame = 65535, 65535, 16384
        self._block: tuple[int, int, bytes] | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected: open the windows wide, take no pushes."""
        self._transport = cast(asyncio.Transport, transport)
        greeting = h2.PREFACE + h2.settings([(2, 0), (4, _WINDOW)]) + h2.window_update(0, _WINDOW)
        self._transport.write(greeting)

    def connection_lost(self, exc: Exception | None) -> None:
        """All calls that are under way fail."""
        self.open = False
        for call in [*self.calls.values()]:
            self._end(call, Unavailable("the server hung up"))

    def start(self, fields: list[tuple[str, str]]) -> _Call:
        """Begin a call."""
        if not self.open or self._transport is None:
            raise Unavailable("the connection is closed")
        self._last += 2
        call = _Call(self._last, self._initial, asyncio.get_running_loop().create_future())
        self.calls[call.number] = call
        block = self._encoder.encode(fields)
        self._transport.write(h2.frame(h2.HEADERS, h2.END_HEADERS, call.number, block))
        return call

    def send(self, call: _Call, data: bytes) -> None:
        """Send the only message of a call's requests, and that it is the last one."""
        call.out.append((b"\0" + len(data).to_bytes(4, "big") + data, True))
        self._pump()

    def _pump(self) -> None:
        parts: list[bytes] = []
        for call in self.calls.values():
            while call.out:
                data, end = call.out[0]
                size = min(len(data), call.window, self._window, self._frame)
                if size <= 0 < len(data):
                    break
                call.window -= size
                self._window -= size
                last = size == len(data)
                parts.append(h2.frame(h2.DATA, h2.END_STREAM if end and last else 0, call.number, data[:size]))
                call.out.popleft()
                if not last:
                    call.out.appendleft((data[size:], end))
        if parts and self._transport is not None:
            self._transport.write(b"".join(parts))

    def drop(self, call: _Call) -> None:
        """The caller does not wait for this one any more."""
        if self.calls.pop(call.number, None) is not None and self._transport is not None and self.open:
            self._transport.write(h2.reset(call.number, h2.CANCEL))

    def data_received(self, data: bytes) -> None:
        """Frames of the server."""
        self._buffer += data
        place, buffer = 0, self._buffer
        while len(buffer) - place >= 9:
            high, low, kind, flags, number = h2.TOP.unpack_from(buffer, place)
            end = place + 9 + (high << 16 | low)
            if end > len(buffer):
                break
            self._frame_in(kind, flags, number, buffer[place + 9 : end])
            place = end
        self._buffer = buffer[place:]

    def _frame_in(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        transport = cast(asyncio.Transport, self._transport)
        if kind == h2.DATA:
            self._on_data(flags, number, payload)
        elif kind == h2.HEADERS:
            self._block = number, flags, payload
            if flags & h2.END_HEADERS:
                self._on_headers()
        elif kind == h2.CONTINUATION and self._block is not None:
            self._block = self._block[0], self._block[1], self._block[2] + payload
            if flags & h2.END_HEADERS:
                self._on_headers()
        elif kind == h2.SETTINGS and not flags & h2.ACK:
            self._on_settings(payload)
        elif kind == h2.PING and not flags & h2.ACK:
            transport.write(h2.frame(h2.PING, h2.ACK, 0, payload))
        elif kind == h2.WINDOW_UPDATE:
            self._on_window(number, int.from_bytes(payload, "big"))
        elif kind == h2.RST_STREAM and number in self.calls:
            code = int.from_bytes(payload, "big")
            busy = code in (h2.REFUSED_STREAM, h2.ENHANCE_YOUR_CALM)
            self._end(self.calls[number], (Busy if busy else Unavailable)(f"the server reset the call ({code})"))
        elif kind == h2.GOAWAY:
            self.open = False
            if not self.calls:
                transport.close()

    def _on_window(self, number: int, step: int) -> None:
        if number == 0:
            self._window += step
        elif number in self.calls:
            self.calls[number].window += step
        self._pump()

    def _on_data(self, flags: int, number: int, payload: bytes) -> None:
        transport = cast(asyncio.Transport, self._transport)
        if payload:
            transport.write(h2.window_update(0, len(payload)))
        call = self.calls.get(number)
        if call is None:
            return
        call.body += payload
        call.fresh.set()
        if flags & h2.END_STREAM:
            self._end(call, None)
        elif payload:
            transport.write(h2.window_update(number, len(payload)))

    def _on_headers(self) -> None:
        number, flags, block = cast(tuple[int, int, bytes], self._block)
        self._block = None
        try:
            fields = {str(name): str(value) for name, value in self._decoder.decode(block)}
        except hpack.HPACKError:
            cast(asyncio.Transport, self._transport).abort()
            return
        call = self.calls.get(number)
        if call is not None:
            call.fields |= fields
            if flags & h2.END_STREAM:
                self._end(call, None)

    def _on_settings(self, payload: bytes) -> None:
        for place in range(0, len(payload) - 5, 6):
            key, value = int.from_bytes(payload[place : place + 2], "big"), h2.WORD.unpack_from(payload, place + 2)[0]
            if key == 4:
                for call in self.calls.values():
                    call.window += value - self._initial
                self._initial = value
            elif key == 5:
                self._frame = value
            elif key == 1:
                self._encoder.header_table_size = min(value, 4096)
        cast(asyncio.Transport, self._transport).write(h2.frame(h2.SETTINGS, h2.ACK, 0))
        self._pump()

    def _end(self, call: _Call, error: TorchshipError | None) -> None:
        self.calls.pop(call.number, None)
        if not call.done.done():
            if error is None:
                error = _failure(call.fields)
            if error is None:
                call.done.set_result(None)
            else:
                call.done.set_exception(error)
                call.done.exception()  # looked at: a call that was given up warns nobody
        call.fresh.set()
        if not self.open and not self.calls and self._transport is not None:
            self._transport.abort()

    def close(self) -> None:
        """Hang up."""
        self.open = False
        if self._transport is not None:
            self._transport.abort()  # TLS would go on to say good-bye after its loop has ended


def _failure(fields: Mapping[str, str]) -> TorchshipError | None:
    """The error that the trailers tell, if they do."""
    code = fields.get("grpc-status", "2")
    if code == "0":
        return None
    text = unquote(fields.get("grpc-message", "")) or f"status {fields.get(':status', '?')}, grpc-status {code}"
    http = {"3": 400, "5": 404, "7": 403, "8": 503, "12": 400, "14": 503, "16": 401}.get(code, 500)
    wait = fields.get("grpc-retry-pushback-ms", "")
    again = int(wait) / 1e3 if wait.isdigit() else 0.0
    return error_of(Status(http, int(code) if code.isdigit() else 2), text, retry_after=again)


class GrpcLink:
    """Speaks the Open Inference Protocol over gRPC."""

    def __init__(self, address: Address, *, tls: ssl.SSLContext | None, headers: Mapping[str, str], size: int) -> None:
        """At most `size` calls are under way at a time; further ones wait."""
        self._address, self._tls = address, tls
        if tls is not None:
            tls.set_alpn_protocols(["h2"])
        self._extra = [(name.lower(), value) for name, value in headers.items()]
        self._connection: _Connection | None = None
        self._connecting = asyncio.Lock()
        self._room = asyncio.Semaphore(size)

    async def infer(self, request: Request) -> Response:
        """One inference. Raises what the status of the answer means."""
        timeout = request.deadline
        return decode_grpc(await self.unary("ModelInfer", encode_grpc(request), timeout=timeout))

    async def stream(self, request: Request) -> AsyncIterator[Response]:
        """Every answer of a model that streams."""
        request.parameters["triton_enable_empty_final_response"] = True
        async with self._room:
            connection = await self._connect()
            call = connection.start(self._fields("ModelStreamInfer", request.deadline))
            try:
                connection.send(call, encode_grpc(request))
                while True:
                    await call.fresh.wait()
                    call.fresh.clear()
                    while (found := _next_message(call.body)) is not None:
                        response = decode_grpc_stream(found)
                        if not response.parameters.pop("triton_final_response", False) or response.outputs:
                            yield response
                    if call.done.done():
                        call.done.result()
                        return
            finally:
                connection.drop(call)

    async def plain(self, method: str, value: Mapping[str, Any] = {}) -> Any:
        """A method of the inference service with plain data in; its message out."""
        ask = message(f"inference.{method}Request")(**value)
        return message(f"inference.{method}Response").FromString(await self.unary(method, ask.SerializeToString()))

    async def unary(self, method: str, data: bytes, *, timeout: float = 0.0) -> bytes:  # noqa: ASYNC109
        """One message there and one back."""
        async with self._room:
            connection = await self._connect()
            call = connection.start(self._fields(method, timeout))
            try:
                connection.send(call, data)
                if timeout:
                    try:
                        await asyncio.wait_for(asyncio.shield(call.done), timeout)
                    except TimeoutError:
                        raise Expired(f"no answer within {timeout:g} s") from None
                else:
                    await call.done
            finally:
                connection.drop(call)
            return bytes(_next_message(call.body) or b"")

    def _fields(self, method: str, timeout: float) -> list[tuple[str, str]]:
        fields = [
            (":method", "POST"), (":scheme", "https" if self._tls else "http"), (":path", _SERVICE + method),
            (":authority", f"{self._address.host}:{self._address.port}"),
            ("content-type", "application/grpc"), ("te", "trailers"), ("user-agent", "torchship"), *self._extra,
        ]  # fmt: skip
        if timeout:
            fields.append(("grpc-timeout", f"{min(99_999_999, max(1, round(timeout * 1e3)))}m"))
        return fields

    async def _connect(self) -> _Connection:
        async with self._connecting:
            if self._connection is None or not self._connection.open:
                host, port = self._address.host, self._address.port
                loop = asyncio.get_running_loop()
                try:
                    _, self._connection = await loop.create_connection(_Connection, host, port, ssl=self._tls)
                except OSError as fault:
                    where = f"{self._address.host}:{self._address.port}"
                    raise Unavailable(f"no answer from {where}: {fault}", hint="is it serving?") from None
            return self._connection

    async def close(self) -> None:
        """Hang up."""
        if self._connection is not None:
            self._connection.close()
            await asyncio.sleep(0)


def _next_message(body: bytearray) -> bytes | None:
    if len(body) < 5:
        return None
    end = 5 + int.from_bytes(body[1:5], "big")
    if len(body) < end:
        return None
    found = bytes(memoryview(body)[5:end])
    del body[:end]
    return found
