"""The Open Inference Protocol over gRPC with Triton's extensions, health and reflection: a table of methods."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import aclosing
from typing import Any

from google.protobuf.json_format import ParseDict
from google.protobuf.message import DecodeError

from torchship.errors import BadInput, NotFound, TorchshipError
from torchship.serve.api.front import Front
from torchship.serve.api.regions import NO_CUDA, refuse_cuda
from torchship.serve.http.exchange import settle, spawn
from torchship.serve.http.http2.calls import Call
from torchship.serve.http.site import Rpc
from torchship.wire.messages import Request, Response
from torchship.wire.oip_grpc import InferCodec, plain_parameters
from torchship.wire.raw import Buffer, varint
from torchship.wire.schema import Method, file_of, message, methods, services
from torchship.wire.status import text_of

_OIP = "/inference.GRPCInferenceService/"
_HEALTH = "/grpc.health.v1.Health/"
_FIELDS = {bool: "bool_param", int: "uint32_param", str: "string_param"}  # of a log setting
_INVALID, _NOT_FOUND, _UNIMPLEMENTED = 3, 5, 12
_AT_ONCE = 64  # requests of one call
Work = Callable[[Any], Any]


def all_rpcs(front: Front) -> Mapping[str, Rpc]:
    """Every method by its path."""
    known, codec = methods(), InferCodec(regions=front.regions)
    plain = {_OIP + name: work for name, work in {**_protocol(front), **_admin(front)}.items()}
    plain[_HEALTH + "Check"] = (lambda ask: _health(front, ask.service)), ""
    return {
        **{path: Rpc(_answering(known[path], work), scope=scope) for path, (work, scope) in plain.items()},
        _OIP + "ModelInfer": Rpc(GrpcInference(front, codec), scope="infer"),
        _OIP + "ModelStreamInfer": Rpc(stream=_StreamInference(front, codec), scope="infer"),
        _HEALTH + "Watch": Rpc(_health_watch(front)),
        **{
            f"/{package}.ServerReflection/ServerReflectionInfo": Rpc(stream=_reflection(package))
            for package in ("grpc.reflection.v1", "grpc.reflection.v1alpha")
        },
    }


def _protocol(front: Front) -> dict[str, tuple[Work, str]]:
    """The methods that tell of models, each with its scope; they give the answer as plain data."""
    service = front.service
    return {
        "ServerLive": (lambda ask: {"live": True}, ""),
        "ServerReady": (lambda ask: {"ready": service.ready}, ""),
        "ModelReady": (lambda ask: {"ready": service.model_ready(ask.name, ask.version)}, ""),
        "ServerMetadata": (lambda ask: service.server_metadata(), ""),
        "ModelMetadata": (lambda ask: service.model_metadata(ask.name, ask.version), ""),
        "ModelConfig": (lambda ask: {"config": service.model_config(ask.name, ask.version)}, ""),
        "ModelStatistics": (lambda ask: service.statistics(ask.name, ask.version), "metrics"),
    }


def _admin(front: Front) -> dict[str, tuple[Work, str]]:
    """The methods that look after the server."""
    service, memory = front.service, front.memory

    def trace(ask: Any) -> dict[str, Any]:
        found = front.trace({name: list(setting.value) for name, setting in ask.settings.items()}, ask.model_name)
        return {
            "settings": {name: {"value": [value] if type(value) is str else value} for name, value in found.items()}
        }

    def logs(ask: Any) -> dict[str, Any]:
        found = front.logs.change(plain_parameters(ask.settings))
        return {"settings": {name: {_FIELDS[type(value)]: value} for name, value in found.items()}}

    def regions(found: list[dict[str, Any]]) -> dict[str, Any]:
        return {"regions": {one["name"]: one for one in found}}

    works: dict[str, Work] = {
        "RepositoryIndex": lambda ask: {"models": service.repository_index(ready=ask.ready)},
        "RepositoryModelLoad": lambda ask: service.repository_load(ask.model_name, plain_parameters(ask.parameters)),
        "RepositoryModelUnload": lambda ask: service.repository_unload(
            ask.model_name, plain_parameters(ask.parameters)
        ),
        "SystemSharedMemoryStatus": lambda ask: regions(memory.status(ask.name)),
        "SystemSharedMemoryRegister": lambda ask: front.register(
            ask.name, key=ask.key, offset=ask.offset, size=ask.byte_size
        ),
        "SystemSharedMemoryUnregister": lambda ask: memory.unregister(ask.name),
        "CudaSharedMemoryStatus": lambda ask: regions(NO_CUDA.status(ask.name)),
        "CudaSharedMemoryRegister": lambda ask: refuse_cuda(ask.name),
        "CudaSharedMemoryUnregister": lambda ask: None,
        "TraceSetting": trace,
        "LogSettings": logs,
    }
    return {name: (work, "manage") for name, work in works.items()}


class GrpcInference:
    """ModelInfer: decode, start, and answer from a callback."""

    def __init__(self, front: Front, codec: InferCodec) -> None:
        self._front = front
        self._codec = codec

    def __call__(self, call: Call, body: Buffer, start: int) -> None:
        """Begin one inference; its answer is sent when it is there."""
        if self._codec.slow(body, start):
            spawn(call, self._read_apart, call, body, start)
        else:
            self._begin(call, self._codec.decode(body, start))

    async def _read_apart(self, call: Call, body: Buffer, start: int) -> None:
        request = await asyncio.to_thread(self._codec.decode, body, start)
        if not call.gone:
            self._begin(call, request)

    def _begin(self, call: Call, request: Request) -> None:
        timeout = call.head.timeout
        if timeout and (not request.deadline or timeout < request.deadline):
            request.deadline = timeout
        if self._front.forward:
            self._front.attach(request, self._front.forwarded(call.head))
        call.job = self._front.start(request, self._answer, call)

    def _answer(self, call: Call, request: Request, end: Response | Exception) -> None:
        call.job = None
        if call.gone:
            return
        if isinstance(end, Exception):
            call.fail(end)
            return
        try:
            call.reply(self._codec.encode(end, request), trace=end.trace)
        except Exception as fault:
            call.fail(fault)


class _StreamInference:
    """ModelStreamInfer: many requests and many answers on one call.

    Requests are begun in the order in which they come. Answers of a model that gives one each keep that order; those
    of a model that streams (decoupled) are sent as they come, told apart by their id.
    """

    def __init__(self, front: Front, codec: InferCodec) -> None:
        self._front = front
        self._codec = codec

    async def __call__(self, call: Call) -> None:
        """Run one call until the client has said all and everything is answered."""
        tasks: set[asyncio.Task[None]] = set()
        before: asyncio.Task[None] | None = None
        try:
            async for body in call.messages():
                try:
                    if self._codec.slow(body, 5):
                        request = await asyncio.to_thread(self._codec.decode, body, 5)
                    else:
                        request = self._codec.decode(body, 5)
                    if self._front.forward:
                        self._front.attach(request, self._front.forwarded(call.head))
                    free = self._front.service.streams(request.model, request.version)
                except TorchshipError as fault:
                    _tell_fault(call, "", fault)
                    continue
                task = asyncio.ensure_future(self._held(call, request, None if free else before, free=free))
                before = before if free else task
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                if len(tasks) >= _AT_ONCE:
                    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if tasks:
                await asyncio.wait(tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _held(self, call: Call, request: Request, before: asyncio.Task[None] | None, *, free: bool) -> None:
        """Answer one request, with a hold on its shared memory."""
        held = self._front.memory.hold(request)
        try:
            await self._answers(call, request, before, free=free)
        finally:
            self._front.memory.release(held)

    async def _answers(self, call: Call, request: Request, before: asyncio.Task[None] | None, *, free: bool) -> None:
        """All answers of one request, after those of the request before it.

        As Triton has it, each says in `triton_final_response` whether it is the last; a `free` model's last one is
        empty, and only sent to who asks for it.
        """
        final = bool(request.parameters.pop("triton_enable_empty_final_response", False))
        answers: list[Response] = []
        fault: Exception | None = None
        try:
            async with aclosing(self._front.service.stream(request)) as coming:
                async for response in coming:
                    if before is None:
                        await self._send(call, request, response, last=not free)
                    else:
                        answers.append(response)
        except Exception as caught:
            fault = caught
        if before is not None:
            await asyncio.wait([before])
        for response in answers:
            await self._send(call, request, response, last=True)
        if fault is not None:
            _tell_fault(call, request.id, fault)
        elif final and free:
            empty = Response(request.model, request.version, {}, request.id)
            await self._send(call, Request(request.model, {}), empty, last=True)

    async def _send(self, call: Call, request: Request, response: Response, *, last: bool) -> None:
        response.parameters = {**response.parameters, "triton_final_response": last}
        encoded = self._codec.encode(response, request)
        call.write(b"\x12" + varint(len(encoded)) + encoded)  # infer_response = 2 of a ModelStreamInferResponse
        await call.drained()


def _tell_fault(call: Call, request_id: str, fault: Exception) -> None:
    """An error as one of the answers of a stream, which goes on."""
    answer: Any = message("inference.ModelStreamInferResponse")(error_message=text_of(fault))
    if request_id:
        answer.infer_response.id = request_id
    call.write(answer.SerializeToString())


def _answering(method: Method, work: Work) -> Callable[[Call, Buffer, int], None]:
    """A method whose answer is plain data, at once or from a coroutine."""

    def reply(call: Call, answer: Any) -> None:
        told = ParseDict(answer or {}, method.response(), ignore_unknown_fields=True)
        call.reply(told.SerializeToString())

    def unary(call: Call, body: Buffer, start: int) -> None:
        try:
            ask = method.request.FromString(bytes(memoryview(body)[start:]))
        except DecodeError as fault:
            raise BadInput(f"not a {method.request.DESCRIPTOR.name}: {fault}") from None
        settle(call, work(ask), reply)

    return unary


def _health(front: Front, name: str) -> dict[str, str]:
    service = front.service
    good = service.ready if name in ("", "inference.GRPCInferenceService") else service.model_ready(name)
    return {"status": "SERVING" if good else "NOT_SERVING"}


def _health_watch(front: Front) -> Callable[[Call, Buffer, int], None]:
    """Health's Watch: the status now, and whenever it changes."""

    async def watch(call: Call, name: str) -> None:
        said = ""
        while not call.gone:
            try:
                status = _health(front, name)["status"]
            except NotFound:
                status = "SERVICE_UNKNOWN"
            if status != said:
                said = status
                call.write(message("grpc.health.v1.HealthCheckResponse")(status=status).SerializeToString())
            await asyncio.sleep(0.2)

    def unary(call: Call, body: Buffer, start: int) -> None:
        ask = message("grpc.health.v1.HealthCheckRequest").FromString(bytes(memoryview(body)[start:]))
        spawn(call, watch, call, ask.service)

    return unary


def _reflection(package: str) -> Callable[[Call], Any]:
    """Server reflection of one version, so that grpcurl and its kin need no .proto files: it tells of our own files."""

    async def stream(call: Call) -> None:
        async for body in call.messages():
            try:
                ask = message(f"{package}.ServerReflectionRequest").FromString(bytes(body[5:]))
            except DecodeError:
                call.finish(_INVALID, "not a ServerReflectionRequest")
                return
            call.write(_reflected(ask, message(f"{package}.ServerReflectionResponse")).SerializeToString())
            await call.drained()

    return stream


def _reflected(ask: Any, kind: Any) -> Any:
    tell = kind(valid_host=ask.host, original_request=ask)
    match ask.WhichOneof("message_request"):
        case "list_services":
            for name in services():
                tell.list_services_response.service.add(name=name)
        case "file_by_filename" | "file_containing_symbol" as wish:
            found = file_of(getattr(ask, wish), symbol=wish == "file_containing_symbol")
            if found:
                tell.file_descriptor_response.file_descriptor_proto.append(found)
            else:
                tell.error_response.error_code = _NOT_FOUND
                tell.error_response.error_message = f"not found: {getattr(ask, wish)}"
        case other:
            tell.error_response.error_code = _UNIMPLEMENTED
            tell.error_response.error_message = f"{other} is not answered: there are no extensions"
    return tell
