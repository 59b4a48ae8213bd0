"""A small real gRPC server of the Open Inference Protocol, that can be told to fail."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from torchship.wire.messages import Response
from torchship.wire.oip_grpc import InferCodec
from torchship.wire.schema import message


@dataclass
class Behaviour:
    """What the server does: `fail` is a gRPC code by name for the next `times` calls, `delay` in seconds.

    `rows` counts what it was asked for, `most` is the largest number of calls at the same time.
    """

    fail: str = ""
    times: int = 0
    delay: float = 0.0
    calls: list[dict[str, Any]] = field(default_factory=list)
    headers: list[tuple[str, str]] = field(default_factory=list)
    rows: int = 0
    most: int = 0
    running: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def serve(behaviour: Behaviour, *, port: int = 0, papers: tuple[bytes, bytes] | None = None) -> Iterator[int]:
    """A server of `double` (x:FP32[-1,2] -> y:FP32[-1,2]); gives its port. `papers`: key and certificate for TLS."""
    server = grpc.server(ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers((_Handler(behaviour),))
    if papers:
        found = server.add_secure_port(f"127.0.0.1:{port}", grpc.ssl_server_credentials([papers]))
    else:
        found = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    try:
        yield found
    finally:
        server.stop(None).wait()


class _Handler(grpc.GenericRpcHandler):  # type: ignore[misc]
    def __init__(self, behaviour: Behaviour) -> None:
        self._behaviour = behaviour

    def service(self, details: Any) -> Any:
        calls = {"ModelInfer": self._infer, "ModelMetadata": self._metadata}
        method = details.method.rpartition("/")[2]
        self._behaviour.headers = list(details.invocation_metadata)
        return grpc.unary_unary_rpc_method_handler(calls[method]) if method in calls else None

    def _infer(self, data: bytes, context: Any) -> bytes:
        codec = InferCodec()
        request = codec.decode(data)
        with self._behaviour.lock:
            self._behaviour.calls.append({"model": request.model, **request.parameters})
            self._behaviour.rows += len(request.inputs["x"])
            failing = self._behaviour.times > 0
            self._behaviour.times -= failing
            self._behaviour.running += 1
            self._behaviour.most = max(self._behaviour.most, self._behaviour.running)
        time.sleep(self._behaviour.delay)
        with self._behaviour.lock:
            self._behaviour.running -= 1
        if failing:
            context.abort(getattr(grpc.StatusCode, self._behaviour.fail), "as told")
        return codec.encode(Response(request.model, "1", {"y": request.inputs["x"] * 2}), request)

    def _metadata(self, data: bytes, context: Any) -> bytes:
        asked = message("inference.ModelMetadataRequest").FromString(data)
        if asked.name != "double":
            context.abort(grpc.StatusCode.NOT_FOUND, f"no model {asked.name}")
        answer = message("inference.ModelMetadataResponse")(name=asked.name)
        answer.inputs.add(name="x", datatype="FP32", shape=[-1, 2])
        answer.outputs.add(name="y", datatype="FP32", shape=[-1, 2])
        return bytes(answer.SerializeToString())
