"""Triton's generate extension: plain JSON in, plain JSON out, once or as a stream of server-sent events."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from contextlib import aclosing
from functools import partial
from typing import Any

import msgspec

from torchship.errors import BadInput
from torchship.serve.api.front import Front
from torchship.serve.http.content import json_object
from torchship.serve.http.exchange import Exchange
from torchship.serve.http.router import Route
from torchship.tensors import Array, TensorSpec
from torchship.wire.json_arrays import decode_json_data, encode_json_data
from torchship.wire.messages import Request, Response
from torchship.wire.oip_json import apply_parameters

SILENCE = 15.0  # seconds of a stream without an event, after which a comment is sent
_EVENTS = "text/event-stream; charset=utf-8"
_UNBUFFERED = (("cache-control", "no-cache, no-transform"), ("x-accel-buffering", "no"))  # proxies keep nothing back


def generate_routes(front: Front) -> list[Route]:
    """`generate` answers once; `generate_stream` sends each answer as an event."""
    return [
        Route("POST", f"{base}/{verb}", partial(endpoint, front), "infer")
        for base in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")
        for verb, endpoint in (("generate", _once), ("generate_stream", _stream))
    ]


async def _once(front: Front, exchange: Exchange) -> None:
    """The one answer of a model. Raises BadInput when it gives several."""
    request = _request(front, exchange)
    answers = []
    async with aclosing(front.service.stream(request)) as coming:
        async for answer in coming:
            answers.append(answer)
            if len(answers) > 1:
                break
    if len(answers) != 1:
        raise BadInput(f"the model gave {'several' if answers else 'no'} answers", hint="use generate_stream")
    exchange.answer_json(_plain(answers[0], request))


async def _stream(front: Front, exchange: Exchange) -> None:
    """Every answer as a server-sent event; an error after the first one is an event too.

    A comment breaks a long silence, so that no proxy takes the stream for dead, and we notice who has left.
    """
    request = _request(front, exchange)
    answers = front.service.stream(request)
    coming: asyncio.Future[Response] | None = None
    try:
        while True:
            coming = coming or asyncio.ensure_future(anext(answers))
            done, _ = await asyncio.wait([coming], timeout=SILENCE)
            if done and (fault := coming.exception()) is not None and not isinstance(fault, StopAsyncIteration):
                raise fault
            if not exchange.started:
                exchange.begin(content_type=_EVENTS, headers=_UNBUFFERED)
            if not done:
                exchange.write(b":\n\n")
            elif fault is not None:
                break
            else:
                exchange.write(b"data: " + msgspec.json.encode(_plain(coming.result(), request)) + b"\n\n")
                coming = None
            await exchange.drained()
        exchange.end()
    finally:
        if coming is not None and not coming.done():
            coming.cancel()
            await asyncio.wait([coming])
        await answers.aclose()


def _request(front: Front, exchange: Exchange) -> Request:
    """Fields named as an input are inputs, all others are parameters."""
    places = exchange.head.places
    model, version = places["model"], places.get("version", "")
    fields = json_object(exchange)
    name = fields.pop("id", "")
    if not isinstance(name, str):
        raise BadInput(f"id is {name!r:.60}, expected a string")
    request = Request(model, {}, version, name)
    inputs = front.service.inputs(model, version)
    request.inputs = {spec.name: _array(spec, fields.pop(spec.name)) for spec in inputs if spec.name in fields}
    extra = fields.pop("parameters", {})
    if not isinstance(extra, Mapping):
        raise BadInput("parameters is not an object")
    parameters = {**fields, **extra}
    for name, value in parameters.items():
        if not isinstance(value, str | int | float | bool):
            raise BadInput(f"parameter {name!r} is {type(value).__name__}, expected a string, number or boolean")
    apply_parameters(request, parameters)
    if front.forward:
        front.attach(request, front.forwarded(exchange.head))
    return request


def _array(spec: TensorSpec, value: Any) -> Array:
    """A scalar, or a list of all elements: the last free axis is as long as they need."""
    items = value if isinstance(value, list) else [value]
    shape = [axis if isinstance(axis, int) else 1 for axis in spec.shape]
    if isinstance(value, list) and shape:
        free = [place for place, axis in enumerate(spec.shape) if not isinstance(axis, int)]
        if free:
            shape[free[-1]] = len(items) // max(1, math.prod(shape))
    return decode_json_data(msgspec.json.encode(items), name=spec.name, datatype=spec.dtype, shape=shape)


def _plain(response: Response, request: Request) -> dict[str, Any]:
    told: dict[str, Any] = {"model_name": response.model, "model_version": response.version}
    if request.id:
        told["id"] = request.id
    for name, array in response.outputs.items():
        items = encode_json_data(array)
        told[name] = items[0] if len(items) == 1 else items
    return told
