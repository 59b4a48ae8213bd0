"""The Open Inference Protocol over HTTP with Triton's extensions, and everything else that shares its port."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import msgspec

from torchship.serve.api.docs import docs_routes
from torchship.serve.api.front import Front
from torchship.serve.api.generate import generate_routes
from torchship.serve.api.infer import Inference
from torchship.serve.api.regions import NO_CUDA, refuse_cuda
from torchship.serve.http.content import json_object, read_json
from torchship.serve.http.exchange import Admit, Endpoint, Exchange, settle
from torchship.serve.http.http1 import Connection
from torchship.serve.http.http2.connection import Connection2
from torchship.serve.http.listen import Listener, LocalListener, bind
from torchship.serve.http.pool import PooledListener, ReceiverPool
from torchship.serve.http.router import Route, Router
from torchship.serve.http.site import ConnectionLimits, Cors, Rpc, Site


class Rpcs(Mapping[str, Rpc]):
    """Every gRPC method by its path, made when the first is asked for: protobuf and its messages take 5 MB."""

    def __init__(self, front: Front) -> None:
        self._front = front

    @cached_property
    def found(self) -> Mapping[str, Rpc]:
        from torchship.serve.api.grpc import all_rpcs

        return all_rpcs(self._front)

    def __getitem__(self, path: str) -> Rpc:
        return self.found[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)


async def listen(
    front: Front,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    limits: ConnectionLimits | None = None,
    admit: Admit | None = None,
    tls: ssl.SSLContext | None = None,
    shared: bool = False,
    cors_origins: Sequence[str] = (),
    routes: Sequence[Route] = (),
    grpc_only: bool = False,
    receivers: ReceiverPool | None = None,
    thrifty: bool = False,
) -> Listener:
    """Serve HTTP/1.1 and HTTP/2 (and gRPC over the latter, or nothing but that) until the listener is closed.

    `routes` adds endpoints of applications to the same port. `receivers`, which have the certificate themselves, run
    the connections instead of this process. `thrifty`: what gRPC needs is loaded by its first call. Raises
    Unavailable where the port cannot be bound.
    """
    cors = Cors(cors_origins) if cors_origins else None
    rpcs = Rpcs(front) if thrifty and not grpc_only else Rpcs(front).found
    router = Router(() if grpc_only else all_routes(front, routes))
    site = Site(router.resolve, limits or ConnectionLimits(), admit, rpcs=rpcs, cors=cors)
    protocol = Connection2 if grpc_only else Connection
    if receivers is None:
        return LocalListener(site, await bind(site, protocol, host=host, port=port, tls=tls, shared=shared))
    server = await bind(site, protocol, host=host, port=port, shared=shared, serve=False)
    site.cors = None  # the receivers see to that
    return PooledListener(receivers, receivers.serve(site, grpc_only=grpc_only, origins=cors_origins), server)


def all_routes(front: Front, extra: Sequence[Route] = ()) -> list[Route]:
    """Everything that the port answers, and its description."""
    known = [*_protocol_routes(front), *_admin_routes(front), *generate_routes(front), *extra]
    return [*known, *docs_routes(front, known)]


def _answering(work: Callable[[Exchange], Any]) -> Endpoint:
    """An endpoint that answers with what `work` gives, at once or by a coroutine, as JSON; nothing is `{}`."""

    def answer(exchange: Exchange, found: Any) -> None:
        exchange.answer_json({} if found is None else found)

    return lambda exchange: settle(exchange, work(exchange), answer)


def _protocol_routes(front: Front) -> list[Route]:
    """The paths of the Open Inference Protocol, and /metrics."""
    service, inference = front.service, Inference(front)

    def metrics(exchange: Exchange) -> None:
        exchange.answer(service.metrics().encode(), content_type="text/plain; version=0.0.4; charset=utf-8")

    def ready(exchange: Exchange) -> None:
        good = service.ready
        exchange.answer_json({"ready": good}, status=200 if good else 503)

    def model_ready(exchange: Exchange) -> None:
        name, version = _which(exchange)
        good = service.model_ready(name, version)
        exchange.answer_json({"name": name, "ready": good}, status=200 if good else 503)

    def models(_: Exchange) -> dict[str, Any]:
        return {"models": sorted({entry["name"] for entry in service.repository_index()})}

    def get(path: str, work: Callable[[Exchange], Any], scope: str = "", about: str = "") -> Route:
        return Route("GET", path, _answering(work), scope, about)

    routes = [
        get("/v2", lambda _: service.server_metadata(), about="Name, version and extensions."),
        get("/v2/health/live", lambda _: {"live": True}, about="Whether the server lives."),
        Route("GET", "/v2/health/ready", ready, about="Whether every model answers."),
        Route("GET", "/metrics", metrics, "metrics", "Prometheus metrics."),
        get("/v2/models/stats", lambda _: service.statistics(), "metrics", "Statistics of all models."),
        get("/v2/models", models, about="Names of all models."),
    ]
    for base in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        routes += [
            Route("POST", f"{base}/infer", inference, "infer", "One inference: JSON, binary tensors, or a picture."),
            get(base, lambda exchange: service.model_metadata(*_which(exchange))),
            Route("GET", f"{base}/ready", model_ready),
            get(f"{base}/config", lambda exchange: service.model_config(*_which(exchange))),
            get(f"{base}/stats", lambda exchange: service.statistics(*_which(exchange)), "metrics"),
        ]
    return routes


def _which(exchange: Exchange) -> tuple[str, str]:
    places = exchange.head.places
    return places["model"], places.get("version", "")


class _SharedFile(msgspec.Struct):
    """What a caller says of system shared memory."""

    key: str
    byte_size: int
    offset: int = 0


def _admin_routes(front: Front) -> list[Route]:
    """Triton's extensions to look after a server, which a token with the scope manage may use."""
    service, memory = front.service, front.memory

    def place(exchange: Exchange, name: str = "region") -> str:
        return exchange.head.places.get(name, "")

    def changes(exchange: Exchange) -> dict[str, Any]:
        return json_object(exchange) if exchange.head.method == "POST" else {}

    def register(exchange: Exchange) -> None:
        file = read_json(exchange, _SharedFile)
        front.register(place(exchange), key=file.key, offset=file.offset, size=file.byte_size)

    def index(exchange: Exchange) -> list[dict[str, Any]]:
        return service.repository_index(ready=json_object(exchange).get("ready", False))

    def model(exchange: Exchange) -> tuple[str, Any]:
        return place(exchange, "model"), json_object(exchange).get("parameters", {})

    repository = "/v2/repository"
    table: list[tuple[str, str, Callable[[Exchange], Any]]] = [
        ("POST", f"{repository}/index", index),
        ("POST", f"{repository}/models/{{model}}/load", lambda exchange: service.repository_load(*model(exchange))),
        ("POST", f"{repository}/models/{{model}}/unload", lambda exchange: service.repository_unload(*model(exchange))),
        ("POST", "/v2/drain", lambda _: front.finish()),
        ("POST", "/v2/systemsharedmemory/region/{region}/register", register),
        ("POST", "/v2/cudasharedmemory/region/{region}/register", lambda exchange: refuse_cuda(place(exchange))),
    ]
    for end in ("", "/region/{region}"):
        table += [
            ("GET", f"/v2/systemsharedmemory{end}/status", lambda exchange: memory.status(place(exchange))),
            ("POST", f"/v2/systemsharedmemory{end}/unregister", lambda exchange: memory.unregister(place(exchange))),
            ("GET", f"/v2/cudasharedmemory{end}/status", lambda exchange: NO_CUDA.status(place(exchange))),
            ("POST", f"/v2/cudasharedmemory{end}/unregister", lambda _: None),
        ]
    for method in ("GET", "POST"):
        table += [
            (method, "/v2/logging", lambda exchange: front.logs.change(changes(exchange))),
            (method, "/v2/trace/setting", lambda exchange: front.trace(changes(exchange))),
            (
                method,
                "/v2/models/{model}/trace/setting",
                lambda exchange: front.trace(changes(exchange), place(exchange, "model")),
            ),
        ]
    return [Route(method, path, _answering(work), "manage") for method, path, work in table]
