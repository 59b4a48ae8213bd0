"""POST .../infer: decode, submit, and answer from the future's callback, so that no request costs a Task."""

from __future__ import annotations

import asyncio
import re
from functools import partial
from typing import NamedTuple

from torchship.errors import BadInput, Cancelled
from torchship.serve.protocols._exchange import JSON, Exchange, Head
from torchship.serve.protocols._front import Front
from torchship.serve.protocols._served import Served
from torchship.tensors import Axis, Free, TensorSpec
from torchship.wire.messages import Request, Response
from torchship.wire.oip_json import Body, decode_plain, decode_request, encode_response

_OCTETS = "application/octet-stream"
_LENGTH = "inference-header-content-length"
_DIGITS = re.compile(r"[0-9]{1,15}")


class _About(NamedTuple):
    """What a request head says about its body; the same for every request with that head."""

    model: str
    version: str
    length: int | None
    plain: bool
    headers: dict[str, str]


class Inference:
    """The infer endpoint of all models of a service."""

    def __init__(self, front: Front) -> None:
        self._service = front.service
        self._regions = front.regions
        self._tracing = front.tracing
        self._front = front

    def __call__(self, exchange: Exchange) -> None:
        """Begin one inference; its answer is sent when its future is done."""
        request = self.decode(exchange)
        exchange.job = future = self._service.submit(request)
        future.add_done_callback(partial(self._answer, exchange, request))
        if self._tracing.active and (start := self._tracing.sample(request)):
            future.add_done_callback(lambda done: self._tracing.record(request, start=start))

    def decode(self, exchange: Exchange) -> Request:
        """The request in the body: JSON, JSON with binary tensors, or nothing but the only input's bytes."""
        head = exchange.head
        about: _About | None = head.memo
        if about is None:
            about = head.memo = self._read(head)
        if about.plain:
            inputs = input_specs(self._service, about.model, about.version)
            request = decode_plain(exchange.body, model=about.model, version=about.version, inputs=inputs)
            request.binary = about.length is not None  # who sends a picture wants to read the answer
        else:
            request = decode_request(
                exchange.body,
                model=about.model,
                version=about.version,
                header_length=about.length,
                regions=self._regions,
            )
        if about.headers:
            request.headers = dict(about.headers)
        return request

    def _read(self, head: Head) -> _About:
        """What the head of a request says about its body."""
        headers = head.headers
        length = headers.get(_LENGTH)
        if length is not None and not _DIGITS.fullmatch(length):
            raise BadInput(f"{_LENGTH} is {length[:40]!r}, expected a number")
        kind = headers.get("content-type", "")
        plain = kind.startswith(("image/", _OCTETS)) if length is None else int(length) == 0
        number = None if length is None else int(length)
        return _About(head.places["model"], head.places.get("version", ""), number, plain, self._front.forwarded(head))

    def _answer(self, exchange: Exchange, request: Request, future: asyncio.Future[Response]) -> None:
        """The callback of one inference."""
        try:
            response = future.result()
            if not response.id:
                response.id = request.id
            send_body(exchange, encode_response(response, request, regions=self._regions))
        except asyncio.CancelledError:
            exchange.fail(Cancelled("the request was cancelled"))
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
