"""The gRPC methods: infer by callbacks, everything else by messages made from plain data."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

from google.protobuf.json_format import ParseDict
from google.protobuf.message import DecodeError

from torchship.errors import BadInput, NotFound, Unsupported
from torchship.serve.api.front import Front
from torchship.serve.api.regions import SharedMemory
from torchship.serve.api.streams import StreamInference
from torchship.serve.http.http2.calls import Call
from torchship.serve.http.site import Rpc
from torchship.wire.messages import Request, Response
from torchship.wire.oip_grpc import InferCodec
from torchship.wire.raw import Buffer
from torchship.wire.schema import Method, message, methods

_OIP = "/inference.GRPCInferenceService/"
_HEALTH = "/grpc.health.v1.Health/"
Work = Callable[[Any], Any]


def protocol_rpcs(front: Front) -> dict[str, Rpc]:
    """Every method of the inference service, and health checks."""
    service, known = front.service, methods()
    codec = InferCodec(regions=front.regions)
    plain: dict[str, tuple[Work, str]] = {
        "ServerLive": (lambda ask: {"live": service.live}, ""),
        "ServerReady": (lambda ask: {"ready": service.ready}, ""),
        "ModelReady": (lambda ask: {"ready": service.model_ready(ask.name, ask.version)}, ""),
        "ServerMetadata": (lambda ask: service.server_metadata(), ""),
        "ModelMetadata": (lambda ask: service.model_metadata(ask.name, ask.version), ""),
        "ModelConfig": (lambda ask: {"config": service.model_config(ask.name, ask.version)}, ""),
        "ModelStatistics": (lambda ask: service.statistics(ask.name, ask.version), "metrics"),
        "RepositoryIndex": (lambda ask: {"models": service.repository_index(ready=ask.ready)}, "manage"),
        "RepositoryModelLoad": (lambda ask: service.repository_load(ask.model_name, _plain(ask.parameters)), "manage"),
        "RepositoryModelUnload": (
            lambda ask: service.repository_unload(ask.model_name, _plain(ask.parameters)),
            "manage",
        ),
        "SystemSharedMemoryStatus": (lambda ask: _regions(front, ask.name), "manage"),
        "SystemSharedMemoryRegister": (lambda ask: _register(front, ask), "manage"),
        "SystemSharedMemoryUnregister": (lambda ask: _unregister(front, ask.name), "manage"),
        "CudaSharedMemoryStatus": (lambda ask: _cuda_region(ask.name), "manage"),
        "CudaSharedMemoryRegister": (_no_cuda, "manage"),
        "CudaSharedMemoryUnregister": (lambda ask: {}, "manage"),
        "TraceSetting": (lambda ask: _trace(front, ask), "manage"),
        "LogSettings": (lambda ask: _logs(front, ask), "manage"),
    }
    rpcs = {_OIP + name: Rpc(_Plain(known[_OIP + name], work), scope=scope) for name, (work, scope) in plain.items()}
    rpcs[_OIP + "ModelInfer"] = Rpc(Inference(front, codec), scope="infer")
    rpcs[_OIP + "ModelStreamInfer"] = Rpc(stream=StreamInference(front, codec), scope="infer")
    rpcs[_HEALTH + "Check"] = Rpc(_Plain(known[_HEALTH + "Check"], lambda ask: _health(front, ask.service)))
    rpcs[_HEALTH + "Watch"] = Rpc(_Watch(front))
    return rpcs


class Inference:
    """ModelInfer."""

    def __init__(self, front: Front, codec: InferCodec) -> None:
        self._front = front
        self._service = front.service
        self._codec = codec
        self._tracing = front.tracing

    def __call__(self, call: Call, body: Buffer, start: int) -> None:
        """Begin one inference; its answer is sent when it is there."""
        request = self._codec.decode(body, start)
        timeout = call.head.timeout
        if timeout and (not request.deadline or timeout < request.deadline):
            request.deadline = timeout
        if self._front.forward:
            self._front.attach(request, self._front.forwarded(call.head))
        answer = self._tracing.around(self._answer, request) if self._tracing.active else self._answer
        call.job = self._service.start(request, answer, call)

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


class _Watch:
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


def _plain(parameters: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, parameter in parameters.items():
        choice = parameter.WhichOneof("parameter_choice")
        found[name] = getattr(parameter, choice) if choice else None
    return found


def _regions(front: Front, name: str) -> dict[str, Any]:
    memory = front.regions or SharedMemory()
    return {"regions": {one["name"]: one for one in memory.status(name)}}


def _register(front: Front, ask: Any) -> None:
    if front.regions is None:
        raise Unsupported("shared memory is off", hint="set shared_memory = true in [control]")
    front.regions.register(ask.name, key=ask.key, offset=ask.offset, size=ask.byte_size)


def _unregister(front: Front, name: str) -> None:
    if front.regions is not None:
        front.regions.unregister(name)


def _cuda_region(name: str) -> None:
    if name:
        raise NotFound(f"Unable to find cuda shared memory region: '{name}'")


def _no_cuda(ask: Any) -> None:
    text = f"failed to register CUDA shared memory region '{ask.name}': this server does not take CUDA memory"
    raise Unsupported(text, hint="use system shared memory or binary tensors")


def _trace(front: Front, ask: Any) -> dict[str, Any]:
    if ask.model_name:
        front.service.model_metadata(ask.model_name)
    changes = {name: list(setting.value) for name, setting in ask.settings.items()}
    found = front.tracing.change(changes, ask.model_name)
    return {
        "settings": {name: {"value": value if isinstance(value, list) else [value]} for name, value in found.items()}
    }


def _logs(front: Front, ask: Any) -> dict[str, Any]:
    fields = {bool: "bool_param", int: "uint32_param", str: "string_param"}
    found = front.logs.change(_plain(ask.settings))
    return {"settings": {name: {fields[type(value)]: value} for name, value in found.items()}}


__all__ = ["Inference", "Request", "protocol_rpcs"]
