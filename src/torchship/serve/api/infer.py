"""POST .../infer: decode, start, and answer from a callback, so that no request costs a Task or a future."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from torchship.errors import BadInput
from torchship.serve.api.front import Front
from torchship.serve.http.content import query_parameters
from torchship.serve.http.exchange import JSON, Exchange, Head, Headers, spawn
from torchship.stage import Value
from torchship.wire import oip_json
from torchship.wire.messages import Request, Response
from torchship.wire.oip_json import Body, TemplateCache, decode_plain, decode_request, encode_response, encode_slice
from torchship.wire.raw import LONG, Buffer

_OCTETS = "application/octet-stream"
_LENGTH = "inference-header-content-length"
_DIGITS = re.compile(r"[0-9]{1,15}")
_KNOWN = 256  # models, versions and lengths of the JSON before binary data
_told: Callable[[int], Headers] = lru_cache(maxsize=256)(lambda length: ((_LENGTH, str(length)),))


class _About(NamedTuple):
    """What a request head says about its body; the same for every request with that head.

    `vague`: its content type is what some clients write over whatever they send, JSON too. `parameters` are those of
    the query: a body that is nothing but bytes has no place for them.
    """

    model: str
    version: str
    length: int | None
    plain: bool
    headers: dict[str, str]
    templates: TemplateCache
    vague: bool
    parameters: dict[str, Value]


class Inference:
    """The infer endpoint of all models of a service."""

    def __init__(self, front: Front) -> None:
        self._regions = front.regions
        self._front = front
        # by what a head says, but for the size of its body
        self._templates: dict[tuple[str, str, int | None], TemplateCache] = {}

    def __call__(self, exchange: Exchange) -> None:
        """Begin one inference; its answer is sent when it is there. Long JSON is read in a thread, in pieces."""
        if len(exchange.body) > LONG and not (exchange.head.memo or self._about(exchange.head)).plain:
            spawn(exchange, self._read_apart, exchange)
        else:
            exchange.job = self._front.start(self.decode(exchange), self._answer, exchange)

    async def _read_apart(self, exchange: Exchange) -> None:
        request = await asyncio.to_thread(self.decode, exchange)
        if not exchange.gone:
            exchange.job = self._front.start(request, self._answer, exchange)

    def decode(self, exchange: Exchange) -> Request:
        """The request in the body: JSON, JSON with binary tensors, or nothing but the only input's bytes."""
        about: _About = exchange.head.memo or self._about(exchange.head)
        if about.plain and not (about.vague and _speaks_json(exchange.body)):
            inputs = self._front.service.inputs(about.model, about.version)
            request = decode_plain(exchange.body, model=about.model, version=about.version, inputs=inputs)
            request.parameters = dict(about.parameters)
            request.binary = about.length is not None  # who sends a picture wants to read the answer
        else:
            body = exchange.body
            known = about.templates.read(body) if type(body) is bytes else None
            if known is not None:
                request = known
            else:
                request = decode_request(
                    body, model=about.model, version=about.version, header_length=about.length, regions=self._regions
                )
                if type(body) is bytes:
                    about.templates.learn(body, request)
        if about.headers:
            self._front.attach(request, about.headers)
        return request

    def _about(self, head: Head) -> _About:
        """What the head of a request says about its body: read once, and remembered as its `memo`."""
        headers = head.headers
        length = headers.get(_LENGTH)
        if length is not None and not _DIGITS.fullmatch(length):
            raise BadInput(f"{_LENGTH} is {length[:40]!r}, expected a number")
        kind = headers.get("content-type", "")
        plain = kind.startswith(("image/", _OCTETS)) if length is None else int(length) == 0
        number = None if length is None else int(length)
        vague = length is None and kind.startswith(_OCTETS)
        key = model, version, _ = head.places["model"], head.places.get("version", ""), number
        if key not in self._templates and len(self._templates) >= _KNOWN:
            self._templates.clear()
        templates = self._templates.setdefault(key, TemplateCache(number))
        given = query_parameters(head) if plain and head.query else {}
        about = head.memo = _About(model, version, number, plain, self._front.forwarded(head), templates, vague, given)
        return about

    def _answer(self, exchange: Exchange, request: Request, end: Response | Exception) -> None:
        """The callback of one inference."""
        exchange.job = None
        if isinstance(end, Exception):
            exchange.fail(end)
            return
        try:
            body = encode_slice(end, request)
            if body is None and oip_json.is_long(end, request):
                spawn(exchange, self._write_apart, exchange, request, end)
            else:
                _send(exchange, body or encode_response(end, request, regions=self._regions), end.trace)
        except Exception as fault:
            exchange.fail(fault)

    async def _write_apart(self, exchange: Exchange, request: Request, end: Response) -> None:
        body = await asyncio.to_thread(encode_response, end, request, regions=self._regions)
        _send(exchange, body, end.trace)


def _speaks_json(body: Buffer) -> bool:
    """Whether bytes are the protocol's JSON, and not a tensor that only begins like it."""
    start = bytes(body[:512])
    return start.lstrip()[:1] == b"{" and b'"inputs"' in start


def _send(exchange: Exchange, body: Body, trace: str) -> None:
    """Send an encoded answer with the headers of its kind: one object for a length, so that the head of it is found."""
    length = body.header_length
    headers: Headers = () if length is None else _told(length)
    if trace:
        headers = (*headers, ("traceparent", trace))
    exchange.answer(body.data, content_type=JSON if length is None else _OCTETS, headers=headers)
