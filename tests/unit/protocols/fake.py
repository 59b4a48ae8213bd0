"""A service that answers at once in this process: what the protocols are tested against, without workers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any, cast

import numpy as np

from torchship.errors import Cancelled, NotFound, TorchshipError, Unsupported
from torchship.serve.api.served import Answer
from torchship.tensors import Array, Signature
from torchship.wire.messages import Request, Response

ADD_SUB = Signature.parse("INPUT0:INT32[-1,16], INPUT1:INT32[-1,16] -> OUTPUT0:INT32[-1,16], OUTPUT1:INT32[-1,16]")
ECHO = Signature.parse("x:FP32[-1,16] -> y:FP32[-1,16]")
PICTURE = Signature.parse("image:BYTES[1] -> size:INT64[1]", batched=False)
TEXT = Signature.parse("text_input:BYTES[1] -> text_output:BYTES[1]", batched=False)
SIGNATURES = {"add_sub": ADD_SUB, "echo": ECHO, "picture": PICTURE, "text": TEXT}


class FakeService:
    """Four models: an INT32 add and subtract, an echo of 16 floats, the size of a picture, an upper-casing text."""

    def __init__(self) -> None:
        self.live = True
        self.ready = True
        self.seen: list[Request] = []
        self.fault: Exception | None = None
        self.delay = 0.0
        self.loaded = set(SIGNATURES)
        self.cancelled = 0

    def _signature(self, name: str, version: str) -> Signature:
        if name not in self.loaded or version not in ("", "1"):
            raise NotFound(f"Request for unknown model: '{name}' is not found")
        return SIGNATURES[name]

    def submit(self, request: Request) -> asyncio.Future[Response]:
        signature = self._signature(request.model, request.version)
        signature.check(request.inputs)
        self.seen.append(request)
        future: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        if self.delay:
            future.add_done_callback(self._count)
            asyncio.get_running_loop().call_later(self.delay, self._finish, future, request)
        else:
            self._finish(future, request)
        return future

    def start(self, request: Request, answer: Answer, whom: Any) -> asyncio.Future[Response]:
        future = self.submit(request)

        def tell(done: asyncio.Future[Response]) -> None:
            fault = Cancelled("the caller went away") if done.cancelled() else done.exception()
            answer(whom, request, done.result() if fault is None else cast(Exception, fault))

        future.add_done_callback(tell)
        return future

    def _count(self, future: asyncio.Future[Response]) -> None:
        self.cancelled += future.cancelled()

    def _finish(self, future: asyncio.Future[Response], request: Request) -> None:
        if future.done():
            return
        if self.fault is not None:
            future.set_exception(self.fault)
        else:
            future.set_result(Response(request.model, "1", run(request), request.id))

    async def stream(self, request: Request) -> AsyncIterator[Response]:
        self._signature(request.model, request.version).check(request.inputs)
        count = request.parameters.get("count", 1)
        for _ in range(count if isinstance(count, int) else 1):
            yield Response(request.model, "1", run(request), request.id)
            await asyncio.sleep(0)
        if self.fault is not None:
            raise self.fault

    def server_metadata(self) -> dict[str, Any]:
        return {"name": "triton", "version": "0", "extensions": ["binary_tensor_data"]}

    def model_ready(self, name: str, version: str = "") -> bool:
        return name in self.loaded

    def model_metadata(self, name: str, version: str = "") -> dict[str, Any]:
        signature = self._signature(name, version)
        sides = {
            side: [{"name": spec.name, "datatype": spec.dtype, "shape": spec.wire_shape} for spec in specs]
            for side, specs in (("inputs", signature.inputs), ("outputs", signature.outputs))
        }
        return {"name": name, "versions": ["1"], "platform": "fake", **sides}

    def model_config(self, name: str, version: str = "") -> dict[str, Any]:
        self._signature(name, version)
        return {"name": name, "platform": "fake", "max_batch_size": 8}

    def statistics(self, name: str = "", version: str = "") -> dict[str, Any]:
        names = [name] if name else sorted(self.loaded)
        for one in names:
            self._signature(one, version)
        return {"model_stats": [{"name": one, "version": "1", "inference_count": len(self.seen)} for one in names]}

    def metrics(self) -> str:
        return "# TYPE nv_inference_count counter\nnv_inference_count 1\n"

    def repository_index(self, *, ready: bool = False) -> list[dict[str, Any]]:
        return [{"name": name, "version": "1", "state": "READY", "reason": ""} for name in sorted(self.loaded)]

    async def repository_load(self, name: str, parameters: Mapping[str, Any]) -> None:
        if name not in SIGNATURES:
            raise NotFound(f"no model {name!r}")
        self.loaded.add(name)

    async def repository_unload(self, name: str, parameters: Mapping[str, Any]) -> None:
        if name not in SIGNATURES:
            raise Unsupported(f"no model {name!r}")
        self.loaded.discard(name)


def run(request: Request) -> dict[str, Array]:
    """What each model computes."""
    inputs = request.inputs
    match request.model:
        case "add_sub":
            return {"OUTPUT0": inputs["INPUT0"] + inputs["INPUT1"], "OUTPUT1": inputs["INPUT0"] - inputs["INPUT1"]}
        case "echo":
            return {"y": inputs["x"]}
        case "picture":
            return {"size": np.array([len(inputs["image"].reshape(-1)[0])])}
        case "text":
            out = np.empty(1, np.object_)
            out[0] = inputs["text_input"].reshape(-1)[0].upper()
            return {"text_output": out}
    raise TorchshipError("no such model")
