"""ModelStreamInfer: many requests and many answers on one gRPC call."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

from torchship.errors import TorchshipError
from torchship.serve.api.front import Front
from torchship.serve.http.http2.calls import Call
from torchship.wire.messages import Request, Response
from torchship.wire.oip_grpc import InferCodec
from torchship.wire.schema import message
from torchship.wire.status import text_of

_AT_ONCE = 64


class StreamInference:
    """Requests are begun in the order in which they come. Answers of a model that gives one each keep that order;
    those of a model that streams (decoupled) are sent as they come, told apart by their id."""

    def __init__(self, front: Front, codec: InferCodec) -> None:
        self._front = front
        self._service = front.service
        self._codec = codec
        self._answer = message("inference.ModelStreamInferResponse")

    async def __call__(self, call: Call) -> None:
        """Run one call until the client has said all and everything is answered."""
        tasks: set[asyncio.Task[None]] = set()
        decoupled: dict[tuple[str, str], bool] = {}
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
                    free = self._decoupled(request, decoupled)
                except TorchshipError as fault:
                    self._fail(call, "", fault)
                    continue
                task = asyncio.ensure_future(self._one(call, request, None if free else before, free=free))
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

    def _decoupled(self, request: Request, known: dict[tuple[str, str], bool]) -> bool:
        key = request.model, request.version
        if key not in known:
            config = self._service.model_config(*key)
            known[key] = bool(config.get("model_transaction_policy", {}).get("decoupled"))
        return known[key]

    async def _one(self, call: Call, request: Request, before: asyncio.Task[None] | None, *, free: bool) -> None:
        """All answers of one request, after those of the request before it.

        As Triton has it, each says in `triton_final_response` whether it is the last; a `free` model's last one is
        empty, and only sent to who asks for it.
        """
        final = bool(request.parameters.pop("triton_enable_empty_final_response", False))
        regions = self._front.regions
        held = regions.hold(request) if regions is not None else []
        try:
            await self._answers(call, request, before, free=free, final=final)
        finally:
            if regions is not None:
                regions.release(held)

    async def _answers(
        self, call: Call, request: Request, before: asyncio.Task[None] | None, *, free: bool, final: bool
    ) -> None:
        answers: list[Response] = []
        fault: Exception | None = None
        try:
            if before is None:
                async with aclosing(self._service.stream(request)) as coming:
                    async for response in coming:
                        await self._send(call, request, response, last=not free)
            else:
                answers = [response async for response in self._service.stream(request)]
        except Exception as caught:
            fault = caught
        if before is not None:
            await asyncio.wait([before])
        for response in answers:
            await self._send(call, request, response, last=True)
        if fault is not None:
            self._fail(call, request.id, fault)
        elif final and free:
            empty = Response(request.model, request.version, {}, request.id)
            await self._send(call, Request(request.model, {}), empty, last=True)

    async def _send(self, call: Call, request: Request, response: Response, *, last: bool) -> None:
        response.id = response.id or request.id
        response.parameters = {**response.parameters, "triton_final_response": last}
        encoded = self._codec.encode(response, request)
        call.write(_field_two(encoded))
        await call.drained()

    def _fail(self, call: Call, request_id: str, fault: Exception) -> None:
        answer: Any = self._answer(error_message=text_of(fault))
        if request_id:
            answer.infer_response.id = request_id
        call.write(answer.SerializeToString())


def _field_two(data: bytes) -> bytes:
    """`infer_response` of a ModelStreamInferResponse around an encoded ModelInferResponse."""
    size, head = len(data), bytearray(b"\x12")
    while size > 127:
        head.append(size & 127 | 128)
        size >>= 7
    head.append(size)
    return bytes(head) + data
