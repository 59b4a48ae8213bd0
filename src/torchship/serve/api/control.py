"""Triton's extensions to look after a server over HTTP: model repository, shared memory, trace and log settings."""

from __future__ import annotations

from typing import Any

import msgspec

from torchship.errors import BadInput, NotFound, Unsupported
from torchship.serve.api.front import Front
from torchship.serve.api.regions import SharedMemory
from torchship.serve.http.content import json_object, read_json
from torchship.serve.http.exchange import Exchange
from torchship.serve.http.router import Route

_NOTHING: dict[str, Any] = {}


class _Place(msgspec.Struct):
    key: str
    byte_size: int
    offset: int = 0


def control_routes(front: Front) -> list[Route]:
    """The paths, which a token with the scope manage may use."""
    repository, memory, settings = _Repository(front), _Memory(front), _Settings(front)
    shared, cuda = "/v2/systemsharedmemory", "/v2/cudasharedmemory"
    routes = [
        Route("POST", "/v2/repository/index", repository.index, "manage"),
        Route("POST", "/v2/repository/models/{model}/load", repository.load, "manage"),
        Route("POST", "/v2/repository/models/{model}/unload", repository.unload, "manage"),
        Route("GET", f"{shared}/status", memory.status, "manage"),
        Route("GET", f"{shared}/region/{{region}}/status", memory.status, "manage"),
        Route("POST", f"{shared}/region/{{region}}/register", memory.register, "manage"),
        Route("POST", f"{shared}/region/{{region}}/unregister", memory.unregister, "manage"),
        Route("POST", f"{shared}/unregister", memory.unregister, "manage"),
        Route("GET", f"{cuda}/status", lambda exchange: exchange.answer_json([]), "manage"),
        Route("GET", f"{cuda}/region/{{region}}/status", _no_region, "manage"),
        Route("POST", f"{cuda}/region/{{region}}/register", _no_cuda, "manage"),
        Route("POST", f"{cuda}/region/{{region}}/unregister", _nothing, "manage"),
        Route("POST", f"{cuda}/unregister", _nothing, "manage"),
    ]
    for method in ("GET", "POST"):
        routes += [
            Route(method, "/v2/logging", settings.logging, "manage"),
            Route(method, "/v2/trace/setting", settings.trace, "manage"),
            Route(method, "/v2/models/{model}/trace/setting", settings.trace, "manage"),
        ]
    return routes


class _Repository:
    """The model repository extension."""

    def __init__(self, front: Front) -> None:
        self._service = front.service

    def index(self, exchange: Exchange) -> None:
        ready = json_object(exchange).get("ready", False)
        if type(ready) is not bool:
            raise BadInput(f"ready is {ready!r:.60}, expected true or false")
        exchange.answer_json(self._service.repository_index(ready=ready))

    async def load(self, exchange: Exchange) -> None:
        await self._service.repository_load(exchange.head.places["model"], _parameters(exchange))
        exchange.answer_json(_NOTHING)

    async def unload(self, exchange: Exchange) -> None:
        await self._service.repository_unload(exchange.head.places["model"], _parameters(exchange))
        exchange.answer_json(_NOTHING)


def _parameters(exchange: Exchange) -> dict[str, Any]:
    found = json_object(exchange).get("parameters", {})
    if type(found) is not dict:
        raise BadInput("parameters is not an object")
    return found


class _Memory:
    """The system shared memory extension; where the configuration does not enable it, nothing can be registered."""

    def __init__(self, front: Front) -> None:
        self._regions = front.regions or SharedMemory()
        self._on = front.regions is not None

    def status(self, exchange: Exchange) -> None:
        exchange.answer_json(self._regions.status(exchange.head.places.get("region", "")))

    def register(self, exchange: Exchange) -> None:
        place = read_json(exchange, _Place)
        if not self._on:
            raise Unsupported("shared memory is off", hint="set shared_memory = true in [control]")
        name = exchange.head.places["region"]
        self._regions.register(name, key=place.key, offset=place.offset, size=place.byte_size)
        exchange.answer_json(_NOTHING)

    def unregister(self, exchange: Exchange) -> None:
        self._regions.unregister(exchange.head.places.get("region", ""))
        exchange.answer_json(_NOTHING)


def _no_cuda(exchange: Exchange) -> None:
    name = exchange.head.places["region"]
    text = f"failed to register CUDA shared memory region '{name}': this server does not take CUDA memory"
    raise Unsupported(text, hint="use system shared memory or binary tensors")


def _no_region(exchange: Exchange) -> None:
    raise NotFound(f"Unable to find cuda shared memory region: '{exchange.head.places['region']}'")


def _nothing(exchange: Exchange) -> None:
    exchange.answer_json(_NOTHING)


class _Settings:
    """The trace and logging extensions: GET reads, POST changes and tells the result."""

    def __init__(self, front: Front) -> None:
        self._front = front

    def logging(self, exchange: Exchange) -> None:
        changes = json_object(exchange) if exchange.head.method == "POST" else {}
        exchange.answer_json(self._front.logs.change(changes))

    def trace(self, exchange: Exchange) -> None:
        model = exchange.head.places.get("model", "")
        if model:
            self._front.service.model_metadata(model)
        changes = json_object(exchange) if exchange.head.method == "POST" else {}
        exchange.answer_json(self._front.tracing.change(changes, model))
