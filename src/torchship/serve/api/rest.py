"""The Open Inference Protocol over HTTP, and everything else that shares its port."""

from __future__ import annotations

import ssl
from collections.abc import Sequence

from torchship.serve.api.control import control_routes
from torchship.serve.api.docs import docs_routes
from torchship.serve.api.front import Front
from torchship.serve.api.generate import generate_routes
from torchship.serve.api.grpc import all_rpcs
from torchship.serve.api.infer import Inference
from torchship.serve.api.openapi import openapi_route
from torchship.serve.api.served import Served
from torchship.serve.http.exchange import Admit, Exchange, HttpFault
from torchship.serve.http.http1 import Connection
from torchship.serve.http.listen import Listener, bind, tls_context
from torchship.serve.http.router import Route, Router
from torchship.serve.http.site import Limits, Site


async def listen(
    service: Served,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    limits: Limits | None = None,
    admit: Admit | None = None,
    tls: ssl.SSLContext | None = None,
    shared: bool = False,
    front: Front | None = None,
    routes: Sequence[Route] = (),
) -> Listener:
    """Serve HTTP/1.1 and HTTP/2 (and gRPC over the latter) until the listener is closed.

    `routes` adds endpoints of other faces to the same port. Raises Unavailable where the port cannot be bound.
    """
    front = front or Front(service)
    site = Site(Router(all_routes(front, routes)), limits or Limits(), admit, rpcs=all_rpcs(front))
    return await bind(site, Connection, host=host, port=port, tls=tls, shared=shared)


def all_routes(front: Front, extra: Sequence[Route] = ()) -> list[Route]:
    """Everything that the port answers, and its description."""
    known = [*protocol_routes(front), *control_routes(front), *generate_routes(front), *extra]
    return [*known, openapi_route(front, known), *docs_routes(front, known)]


def protocol_routes(front: Front) -> list[Route]:
    """The paths of the Open Inference Protocol, and /metrics."""
    service, inference = front.service, Inference(front)
    routes = [
        Route(
            "GET",
            "/v2",
            lambda exchange: exchange.answer_json(service.server_metadata()),
            about="Name, version and extensions.",
        ),
        Route(
            "GET",
            "/v2/health/live",
            lambda exchange: _health(exchange, "live", service.live),
            about="Whether the server lives.",
        ),
        Route(
            "GET",
            "/v2/health/ready",
            lambda exchange: _health(exchange, "ready", service.ready),
            about="Whether every model answers.",
        ),
        Route("GET", "/metrics", lambda exchange: _metrics(exchange, service), "metrics", "Prometheus metrics."),
        Route(
            "GET",
            "/v2/models/stats",
            lambda exchange: exchange.answer_json(service.statistics()),
            "metrics",
            "Statistics of all models.",
        ),
    ]
    routes.append(Route("GET", "/v2/models", lambda exchange: _models(exchange, service), about="Names of all models."))
    for base in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        routes += [
            Route("POST", f"{base}/infer", inference, "infer", "One inference: JSON, binary tensors, or a picture."),
            Route("GET", base, lambda exchange: exchange.answer_json(service.model_metadata(*_which(exchange)))),
            Route("GET", f"{base}/ready", lambda exchange: _model_ready(exchange, service)),
            Route(
                "GET", f"{base}/config", lambda exchange: exchange.answer_json(service.model_config(*_which(exchange)))
            ),
            Route(
                "GET",
                f"{base}/stats",
                lambda exchange: exchange.answer_json(service.statistics(*_which(exchange))),
                "metrics",
            ),
        ]
    return routes


def _models(exchange: Exchange, service: Served) -> None:
    exchange.answer_json({"models": sorted({entry["name"] for entry in service.repository_index()})})


def _which(exchange: Exchange) -> tuple[str, str]:
    places = exchange.head.places
    return places["model"], places.get("version", "")


def _health(exchange: Exchange, name: str, good: bool) -> None:
    exchange.answer_json({name: good}, status=200 if good else 503)


def _model_ready(exchange: Exchange, service: Served) -> None:
    name, version = _which(exchange)
    ready = service.model_ready(name, version)
    exchange.answer_json({"name": name, "ready": ready}, status=200 if ready else 503)


def _metrics(exchange: Exchange, service: Served) -> None:
    exchange.answer(service.metrics().encode(), content_type="text/plain; version=0.0.4; charset=utf-8")


__all__ = ["Front", "HttpFault", "Limits", "Listener", "Route", "listen", "protocol_routes", "tls_context"]
