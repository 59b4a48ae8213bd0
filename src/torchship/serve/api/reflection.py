"""gRPC server reflection, so that grpcurl and its kin need no .proto files. Source: grpc.reflection.v1."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from google.protobuf.message import DecodeError

from torchship.serve.http.http2.calls import Call
from torchship.serve.http.site import Rpc
from torchship.wire.schema import descriptors, message, services


def reflection_rpcs() -> dict[str, Rpc]:
    """Reflection in both of its versions."""
    versions = ("grpc.reflection.v1", "grpc.reflection.v1alpha")
    return {
        f"/{package}.ServerReflection/ServerReflectionInfo": Rpc(stream=_Reflection(package)) for package in versions
    }


class _Reflection:
    """Answers questions about our own files."""

    def __init__(self, package: str) -> None:
        self._ask = message(f"{package}.ServerReflectionRequest")
        self._tell = message(f"{package}.ServerReflectionResponse")

    async def __call__(self, call: Call) -> None:
        async for body in call.messages():
            try:
                ask = self._ask.FromString(bytes(body[5:]))
            except DecodeError:
                call.finish(3, "not a ServerReflectionRequest")
                return
            call.write(self._answer(ask).SerializeToString())
            await call.drained()

    def _answer(self, ask: Any) -> Any:
        tell = self._tell(valid_host=ask.host, original_request=ask)
        match ask.WhichOneof("message_request"):
            case "list_services":
                for name in services():
                    tell.list_services_response.service.add(name=name)
            case "file_by_filename" | "file_containing_symbol" as wish:
                found = [
                    file for file in descriptors().file if _holds(file, getattr(ask, wish), by_name=wish[5] == "b")
                ]
                tell.file_descriptor_response.file_descriptor_proto.extend(file.SerializeToString() for file in found)
                if not found:
                    tell.error_response.error_code = 5
                    tell.error_response.error_message = f"not found: {getattr(ask, wish)}"
            case other:
                tell.error_response.error_code = 12
                tell.error_response.error_message = f"{other} is not answered: there are no extensions"
        return tell


def _holds(file: Any, wish: str, *, by_name: bool) -> bool:
    if by_name:
        return bool(file.name == wish)
    return wish in _symbols(file)


def _symbols(file: Any) -> Iterator[str]:
    for service in file.service:
        yield f"{file.package}.{service.name}"
        yield from (f"{file.package}.{service.name}.{method.name}" for method in service.method)
    yield from (f"{file.package}.{enum.name}" for enum in file.enum_type)
    for found in file.message_type:
        yield from _nested(found, file.package)


def _nested(found: Any, prefix: str) -> Iterator[str]:
    name = f"{prefix}.{found.name}"
    yield name
    yield from (f"{name}.{enum.name}" for enum in found.enum_type)
    for inner in found.nested_type:
        yield from _nested(inner, name)
