"""gRPC to one server by the package grpcio (the extra `remote`), for the clients and for remote stages."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any

from google.protobuf.json_format import MessageToDict

from torchship.client.address import Address, CallerContext
from torchship.errors import BadConfig, StageFailed, TorchshipError, Unavailable
from torchship.wire.messages import Request, Response
from torchship.wire.oip_grpc import decode_response, encode_request
from torchship.wire.schema import message
from torchship.wire.status import Status, error_of

_SERVICE = "/inference.GRPCInferenceService/"
# The least of the pauses between two connections is also the time that one may take.
_OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.enable_retries", 0), ("grpc.min_reconnect_backoff_ms", 5000),
            ("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 2000)]  # fmt: skip
MOST = 2**31 - 1  # bytes of a message: what protobuf can hold


class GrpcChannel:
    """One server; calls of one message there and one back, from any thread."""

    def __init__(
        self, address: Address, *, tls: ssl.SSLContext | None, headers: Mapping[str, str] = {}, max_message: int = MOST
    ) -> None:
        """`max_message` in bytes bounds an answer. Raises Unavailable without grpcio, BadConfig for a wrong context."""
        try:
            import grpc
        except ImportError:
            raise Unavailable("gRPC needs the package grpcio", hint="pip install 'torchship[remote]'") from None
        self._grpc = grpc
        self._where = address.netloc
        self._headers = tuple((name.lower(), value) for name, value in headers.items())
        options = [*_OPTIONS, ("grpc.max_receive_message_length", max_message)]
        if address.secure:
            credentials = grpc.ssl_channel_credentials(*_papers(tls))
            self._channel = grpc.secure_channel(self._where, credentials, options)
        else:
            self._channel = grpc.insecure_channel(self._where, options)

    def call(self, method: str, data: bytes, *, timeout: float) -> bytes:
        """The answer to one message, within `timeout` seconds. Raises what the status means."""
        try:
            answer: bytes = self._channel.unary_unary(_SERVICE + method)(data, timeout, self._headers)
        except self._grpc.RpcError as fault:
            raise self.error(fault) from None
        return answer

    def begin(self, method: str, data: bytes, *, timeout: float | None) -> Any:
        """The same as grpcio's future."""
        return self._channel.unary_unary(_SERVICE + method).future(data, timeout, self._headers)

    def stream(self, method: str, data: bytes) -> Any:
        """grpcio's iterator over the answers to one message."""
        return self._channel.stream_stream(_SERVICE + method)(iter([data]), None, self._headers)

    def error(self, fault: Any) -> TorchshipError:
        """What a call ended with, as an error of ours."""
        if not isinstance(fault, self._grpc.RpcError):
            return StageFailed(f"gRPC: {fault}")
        code, text = fault.code().value[0], fault.details() or fault.code().name
        if text.startswith("failed to connect"):
            return Unavailable(f"no answer from {self._where}: {text}", hint="is it serving?")
        pushback = dict(fault.trailing_metadata() or ()).get("grpc-retry-pushback-ms", "0")
        later = int(pushback) / 1e3 if pushback.lstrip("-").isdigit() else 0.0
        if "message larger than max" in text:  # grpcio's own words for what did not fit into `max_message`
            later = -1.0
        return error_of(Status(0, code), text, retry_after=later)

    def close(self) -> None:
        """Hang up; calls under way end."""
        self._channel.close()


def _papers(tls: ssl.SSLContext | None) -> tuple[bytes | None, bytes | None, bytes | None]:
    """Authority, key and certificate as grpcio wants them. Raises BadConfig for a context that does not check."""
    if tls is None or isinstance(tls, CallerContext):
        return tls.papers if tls else (None, None, None)
    if tls.verify_mode != ssl.CERT_REQUIRED or not tls.check_hostname:
        raise BadConfig("tls: gRPC always checks the server's certificate", hint="use client.caller_context(...)")
    roots = "".join(map(ssl.DER_cert_to_PEM_cert, tls.get_ca_certs(binary_form=True)))
    return roots.encode() or None, None, None


def ask_metadata(channel: GrpcChannel, model: str, version: str, *, timeout: float) -> dict[str, Any]:
    """A model's metadata, waiting for it. Raises what the status means."""
    asked = message("inference.ModelMetadataRequest")(name=model, version=version).SerializeToString()
    return _plain("ModelMetadata", channel.call("ModelMetadata", asked, timeout=timeout))


def _plain(method: str, data: bytes) -> dict[str, Any]:
    answer = message(f"inference.{method}Response").FromString(data)
    found: dict[str, Any] = MessageToDict(answer, preserving_proto_field_name=True)
    for side in ("inputs", "outputs"):
        for item in found.get(side, ()):
            item["shape"] = [int(axis) for axis in item.get("shape", ())]
    return found


class GrpcLink:
    """Speaks the Open Inference Protocol over gRPC for asyncio: grpcio's calls, waited for in the caller's loop."""

    def __init__(self, address: Address, *, tls: ssl.SSLContext | None, headers: Mapping[str, str], size: int) -> None:
        """At most `size` calls are under way at a time; further ones wait. Raises Unavailable, BadConfig."""
        self._channel = GrpcChannel(address, tls=tls, headers=headers)
        self._room = asyncio.Semaphore(size)

    async def infer(self, request: Request) -> Response:
        """One inference. Raises what the status of the answer means."""
        return decode_response(await self._unary("ModelInfer", encode_request(request), timeout=request.deadline))

    async def stream(self, request: Request) -> AsyncIterator[Response]:
        """Every answer of a model that streams."""
        request.parameters["triton_enable_empty_final_response"] = True
        async with self._room:
            call = self._channel.stream("ModelStreamInfer", encode_request(request))
            wanted, found = threading.Semaphore(0), asyncio.Queue[Any]()
            threading.Thread(
                target=_read,
                args=(call, wanted, found, asyncio.get_running_loop()),
                name="torchship-stream",
                daemon=True,
            ).start()
            try:
                while True:
                    wanted.release()
                    data = await found.get()
                    if data is None:
                        return
                    if isinstance(data, Exception):
                        raise self._channel.error(data)
                    response = decode_response(data, streamed=True)
                    if not response.parameters.pop("triton_final_response", False) or response.outputs:
                        yield response
            finally:
                call.cancel()
                wanted.release()

    async def metadata(self, model: str, version: str) -> dict[str, Any]:
        """The server's metadata, or a model's."""
        return await (self._ask("ModelMetadata", name=model, version=version) if model else self._ask("ServerMetadata"))

    async def ready(self, model: str, version: str) -> bool:
        """Whether the server, or a model, answers."""
        asked = self._ask("ModelReady", name=model, version=version) if model else self._ask("ServerReady")
        return bool((await asked).get("ready"))

    async def statistics(self, model: str, version: str) -> dict[str, Any]:
        """Statistics of a model, or of all."""
        return await self._ask("ModelStatistics", name=model, version=version)

    async def control(self, verb: str, model: str) -> None:
        """`load` or `unload` a model."""
        await self._ask(f"RepositoryModel{verb.capitalize()}", model_name=model)

    async def _ask(self, method: str, **fields: Any) -> dict[str, Any]:
        asked = message(f"inference.{method}Request")(**fields).SerializeToString()
        return _plain(method, await self._unary(method, asked))

    async def _unary(self, method: str, data: bytes, *, timeout: float | None = None) -> bytes:  # noqa: ASYNC109
        loop = asyncio.get_running_loop()
        done = asyncio.Event()

        def told(_: Any) -> None:
            with suppress(RuntimeError):  # the loop has ended: nobody waits
                loop.call_soon_threadsafe(done.set)

        async with self._room:
            call = self._channel.begin(method, data, timeout=timeout or None)
            call.add_done_callback(told)
            try:
                await done.wait()
            finally:
                call.cancel()
        fault = call.exception()
        if fault is not None:
            raise self._channel.error(fault)
        return bytes(call.result())

    async def close(self) -> None:
        """Hang up."""
        self._channel.close()


def _read(call: Any, wanted: threading.Semaphore, found: asyncio.Queue[Any], loop: asyncio.AbstractEventLoop) -> None:
    """The thread of one stream: the next message whenever one is wanted, None after the last, or what it ended with."""
    data: Any = b""
    while isinstance(data, bytes):
        wanted.acquire()
        try:
            data = next(call, None)
        except Exception as fault:
            data = fault
        with suppress(RuntimeError):  # the loop has ended: nobody waits
            loop.call_soon_threadsafe(found.put_nowait, data)
