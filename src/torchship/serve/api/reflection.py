"""gRPC server reflection (grpc.reflection.v1 and v1alpha), so that grpcurl and its kin need no .proto files."""

from __future__ import annotations

from typing import Any

from google.protobuf.message import DecodeError

from torchship.serve.http.http2.calls import Call
from torchship.serve.http.site import Rpc
from torchship.wire.schema import file_of, message, services

_INVALID, _NOT_FOUND, _UNIMPLEMENTED = 3, 5, 12


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
                call.finish(_INVALID, "not a ServerReflectionRequest")
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
