"""The Open Inference Protocol over gRPC with Triton's extensions and health checks: one table of methods."""

from __future__ import annotations

import asyncio
import inspect
import ssl
from collections.abc import Callable, Mapping
from typing import Any

from google.protobuf.json_format import ParseDict
from google.protobuf.message import DecodeError

from torchship.errors import BadInput, NotFound
from torchship.serve.api.admin import Admin
from torchship.serve.api.front import Front
from torchship.serve.api.reflection import reflection_rpcs
from torchship.serve.api.streams import StreamInference
from torchship.serve.http.exchange import Admit
from torchship.serve.http.http2.calls import Call
from torchship.serve.http.http2.connection import Connection2
from torchship.serve.http.listen import Listener, bind
from torchship.serve.http.router import Router
from torchship.serve.http.site import ConnectionLimits, Rpc, Site
from torchship.wire.messages import Request, Response
from torchship.wire.oip_grpc import InferCodec
from torchship.wire.raw import Buffer
from torchship.wire.schema import Method, message, methods

_OIP = "/inference.GRPCInferenceService/"
_HEALTH = "/grpc.health.v1.Health/"
_FIELDS = {bool: "bool_param", int: "uint32_param", str: "string_param"}  # of a log setting
Work = Callable[[Any], Any]


async def listen(
    front: Front,
    *,
    host: str = "127.0.0.1",
    port: int = 8001,
    limits: ConnectionLimits | None = None,
    admit: Admit | None = None,
    tls: ssl.SSLContext | None = None,
    shared: bool = False,
) -> Listener:
    """Serve gRPC until the listener is closed. Raises Unavailable where the port cannot be bound."""
    site = Site(Router(()), limits or ConnectionLimits(), admit, rpcs=all_rpcs(front))
    return await bind(site, Connection2, host=host, port=port, tls=tls, shared=shared)


def all_rpcs(front: Front) -> Mapping[str, Rpc]:
    """Every method by its path."""
    known, codec = methods(), InferCodec(regions=front.regions)
    plain = {_OIP + name: work for name, work in {**_protocol(front), **_admin(front)}.items()}
    plain[_HEALTH + "Check"] = (lambda ask: _health(front, ask.service)), ""
    return {
        **{path: Rpc(_Plain(known[path], work), scope=scope) for path, (work, scope) in plain.items()},
        _OIP + "ModelInfer": Rpc(GrpcInference(front, codec), scope="infer"),
        _OIP + "ModelStreamInfer": Rpc(stream=StreamInference(front, codec), scope="infer"),
        _HEALTH + "Watch": Rpc(_HealthWatch(front)),
        **reflection_rpcs(),
    }


def _protocol(front: Front) -> dict[str, tuple[Work, str]]:
    """The methods that tell of models, each with its scope; they give the answer as plain data."""
    service = front.service
    return {
        "ServerLive": (lambda ask: {"live": service.live}, ""),
        "ServerReady": (lambda ask: {"ready": service.ready}, ""),
        "ModelReady": (lambda ask: {"ready": service.model_ready(ask.name, ask.version)}, ""),
        "ServerMetadata": (lambda ask: service.server_metadata(), ""),
        "ModelMetadata": (lambda ask: service.model_metadata(ask.name, ask.version), ""),
        "ModelConfig": (lambda ask: {"config": service.model_config(ask.name, ask.version)}, ""),
        "ModelStatistics": (lambda ask: service.statistics(ask.name, ask.version), "metrics"),
    }


def _admin(front: Front) -> dict[str, tuple[Work, str]]:
    """The methods that look after the server."""
    admin = Admin(front)

    def trace(ask: Any) -> dict[str, Any]:
        found = admin.trace({name: list(setting.value) for name, setting in ask.settings.items()}, ask.model_name)
        return {
            "settings": {name: {"value": [value] if type(value) is str else value} for name, value in found.items()}
        }

    def logs(ask: Any) -> dict[str, Any]:
        found = admin.logging(_plain(ask.settings))
        return {"settings": {name: {_FIELDS[type(value)]: value} for name, value in found.items()}}

    def regions(found: list[dict[str, Any]]) -> dict[str, Any]:
        return {"regions": {one["name"]: one for one in found}}

    works: dict[str, Work] = {
        "RepositoryIndex": lambda ask: {"models": admin.index(ready=ask.ready)},
        "RepositoryModelLoad": lambda ask: admin.load(ask.model_name, _plain(ask.parameters)),
        "RepositoryModelUnload": lambda ask: admin.unload(ask.model_name, _plain(ask.parameters)),
        "SystemSharedMemoryStatus": lambda ask: regions(admin.regions(ask.name)),
        "SystemSharedMemoryRegister": lambda ask: admin.register(
            ask.name, key=ask.key, offset=ask.offset, size=ask.byte_size
        ),
        "SystemSharedMemoryUnregister": lambda ask: admin.unregister(ask.name),
        "CudaSharedMemoryStatus": lambda ask: regions(admin.cuda_regions(ask.name)),
        "CudaSharedMemoryRegister": lambda ask: admin.register_cuda(ask.name),
        "CudaSharedMemoryUnregister": lambda ask: None,
        "TraceSetting": trace,
        "LogSettings": logs,
    }
    return {name: (work, "manage") for name, work in works.items()}


def _plain(parameters: Any) -> dict[str, Any]:
    """A map of parameters, each a protobuf `oneof`, as plain values."""
    choices = {name: one.WhichOneof("parameter_choice") for name, one in parameters.items()}
    return {name: getattr(parameters[name], choice) if choice else None for name, choice in choices.items()}


class GrpcInference:
    """ModelInfer: decode, start, and answer from a callback."""

    def __init__(self, front: Front, codec: InferCodec) -> None:
        self._front = front
        self._codec = codec

    def __call__(self, call: Call, body: Buffer, start: int) -> None:
        """Begin one inference; its answer is sent when it is there."""
        if self._codec.slow(body, start):
            call.job = asyncio.ensure_future(self._read_apart(call, body, start))
        else:
            self._begin(call, self._codec.decode(body, start))

    async def _read_apart(self, call: Call, body: Buffer, start: int) -> None:
        try:
            request = await asyncio.to_thread(self._codec.decode, body, start)
            if not call.gone:
                self._begin(call, request)
        except Exception as fault:
            call.fail(fault)

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
            if not end.id:
                end.id = request.id
            call.reply(self._codec.encode(end, request), trace=end.trace)
        except Exception as fault:
            call.fail(fault)


class _Plain:
    """A method whose answer is plain data, at once or from a coroutine."""

    def __init__(self, method: Method, work: Work) -> None:
        self._method, self._work = method, work

    def __call__(self, call: Call, body: Buffer, start: int) -> None:
        try:
            ask = self._method.request.FromString(bytes(memoryview(body)[start:]))
        except DecodeError as fault:
            raise BadInput(f"not a {self._method.request.DESCRIPTOR.name}: {fault}") from None
        answer = self._work(ask)
        if inspect.isawaitable(answer):
            call.job = asyncio.ensure_future(self._later(call, answer))
        else:
            self._reply(call, answer)

    async def _later(self, call: Call, answer: Any) -> None:
        try:
            self._reply(call, await answer)
        except Exception as fault:
            call.fail(fault)

    def _reply(self, call: Call, answer: Any) -> None:
        told = ParseDict(answer or {}, self._method.response(), ignore_unknown_fields=True)
        call.reply(told.SerializeToString())


class _HealthWatch:
    """Health's Watch: the status now, and whenever it changes."""

    def __init__(self, front: Front) -> None:
        self._front = front

    def __call__(self, call: Call, body: Buffer, start: int) -> None:
        ask = message("grpc.health.v1.HealthCheckRequest").FromString(bytes(memoryview(body)[start:]))
        call.job = asyncio.ensure_future(self._run(call, ask.service))

    async def _run(self, call: Call, name: str) -> None:
        said = ""
        while not call.gone:
            try:
                status = _health(self._front, name)["status"]
            except NotFound:
                status = "SERVICE_UNKNOWN"
            if status != said:
                said = status
                call.write(message("grpc.health.v1.HealthCheckResponse")(status=status).SerializeToString())
            await asyncio.sleep(0.2)


def _health(front: Front, name: str) -> dict[str, str]:
    service = front.service
    good = service.ready if name in ("", "inference.GRPCInferenceService") else service.model_ready(name)
    return {"status": "SERVING" if good else "NOT_SERVING"}
