"""The protobuf messages of every gRPC service, in a pool of their own.

The pool is private because the pool of the process may hold another package's `inference.ModelInferRequest`.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files
from typing import Any, NamedTuple

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory


class Method(NamedTuple):
    """One gRPC method: its request and answer classes, and which side streams."""

    path: str
    request: Any
    response: Any
    client_streams: bool
    server_streams: bool


@lru_cache(maxsize=1)
def descriptors() -> descriptor_pb2.FileDescriptorSet:
    """The compiled `proto` folder."""
    return descriptor_pb2.FileDescriptorSet.FromString(files("torchship.wire").joinpath("oip.binpb").read_bytes())


@lru_cache(maxsize=1)
def _pool() -> Any:
    pool: Any = descriptor_pool.DescriptorPool()
    for file in descriptors().file:
        pool.Add(file)
    return pool


@lru_cache(maxsize=256)
def message(name: str) -> Any:
    """The class of a message by its full name, as in `inference.ModelInferRequest`."""
    return message_factory.GetMessageClass(_pool().FindMessageTypeByName(name))


def methods() -> dict[str, Method]:
    """Every method of every service by its path, as in `/inference.GRPCInferenceService/ModelInfer`."""
    found = {}
    for file in descriptors().file:
        for service in file.service:
            for method in service.method:
                path = f"/{file.package}.{service.name}/{method.name}"
                request, response = (message(name.lstrip(".")) for name in (method.input_type, method.output_type))
                found[path] = Method(path, request, response, method.client_streaming, method.server_streaming)
    return found


def services() -> list[str]:
    """The full names of all services."""
    return [f"{file.package}.{service.name}" for file in descriptors().file for service in file.service]


def file_of(name: str, *, symbol: bool) -> bytes:
    """The serialized descriptor of a file by its name, or by the full name of what it declares; empty for none."""
    try:
        found = _pool().FindFileContainingSymbol(name) if symbol else _pool().FindFileByName(name)
    except KeyError:
        return b""
    return bytes(found.serialized_pb)
