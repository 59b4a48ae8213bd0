"""POST .../infer: decode, submit, and answer from the future's callback, so that no request costs a Task."""

from __future__ import annotations

import asyncio
import re

from torchship.errors import BadInput, TorchshipError
from torchship.serve.protocols._exchange import JSON, Exchange
from torchship.serve.protocols._front import Front
from torchship.serve.protocols._served import Served
from torchship.tensors import Axis, Free, TensorSpec
from torchship.wire.messages import Request, Response
from torchship.wire.oip_json import Body, Regions, decode_plain, decode_request, encode_response

_OCTETS = "application/octet-stream"
_LENGTH = "inference-header-content-length"
_DIGITS = re.compile(r"[0-9]{1,15}")


class Inference:
    """The infer endpoint of all models of a service."""

    def __init__(self, front: Front) -> None:
        self._service = front.service
        self._regions = front.regions
        self._tracing = front.tracing
        self._forward = re.compile(front.forward) if front.forward else None

    def __call__(self, exchange: Exchange) -> None:
        """Begin one inference; its answer is sent when its future is done."""
        request = self.decode(exchange)
        exchange.job = future = self._service.submit(request)
        future.add_done_callback(_Answering(exchange, request, self._regions))
        if self._tracing.active and (start := self._tracing.sample(request)):
            future.add_done_callback(lambda done: self._tracing.record(request, start=start))

    def decode(self, exchange: Exchange) -> Request:
        """The request in the body: JSON, JSON with binary tensors, or nothing but the only input's bytes."""
        head = exchange.head
        headers = head.headers
        model, version = head.places["model"], head.places.get("version", "")
        length = headers.get(_LENGTH)
        kind = headers.get("content-type", "")
        if length is None and not kind.startswith(("image/", _OCTETS)):
            request = decode_request(exchange.body, model=model, version=version, regions=self._regions)
        elif length is None or length == "0":
            inputs = input_specs(self._service, model, version)
            request = decode_plain(exchange.body, model=model, version=version, inputs=inputs)
            request.binary = length is not None  # who sends a picture wants to read the answer
        else:
            if not _DIGITS.fullmatch(length):
                raise BadInput(f"{_LENGTH} is {length[:40]!r}, expected a number")
            request = decode_request(
                exchange.body, model=model, version=version, header_length=int(length), regions=self._regions
            )
        if self._forward is not None:
            request.headers = {name: value for name, value in headers.items() if self._forward.fullmatch(name)}
        return request


class _Answering:
    """The callback of one inference."""

    __slots__ = ("_exchange", "_regions", "_request")

    def __init__(self, exchange: Exchange, request: Request, regions: Regions | None) -> None:
        self._exchange, self._request, self._regions = exchange, request, regions

    def __call__(self, future: asyncio.Future[Response]) -> None:
        exchange = self._exchange
        if future.cancelled():
            if not exchange.gone:
                exchange.fail(TorchshipError("the request was cancelled"))
            return
        error = future.exception()
        if error is not None:
            exchange.fail(error)
            return
        try:
            response = future.result()
            response.id = response.id or self._request.id
            send_body(exchange, encode_response(response, self._request, regions=self._regions))
        except Exception as fault:
            exchange.fail(fault)


def send_body(exchange: Exchange, body: Body) -> None:
    """Send an encoded answer with the headers of its kind."""
    if body.header_length is None:
        exchange.answer(body.data, content_type=JSON)
    else:
        headers = (("inference-header-content-length", str(body.header_length)),)
        exchange.answer(body.data, content_type=_OCTETS, headers=headers)


def input_specs(service: Served, model: str, version: str) -> list[TensorSpec]:
    """The inputs of a model as its metadata tells them."""
    inputs = service.model_metadata(model, version)["inputs"]
    return [TensorSpec(item["name"], item["datatype"], tuple(map(_axis, item["shape"]))) for item in inputs]


def _axis(length: int) -> Axis:
    return length if length >= 0 else Free()
