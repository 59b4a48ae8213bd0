"""The Open Inference Protocol over HTTP, and everything else that shares its port."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence

from torchship.errors import Unavailable
from torchship.serve.protocols._exchange import Admit, Exchange, HttpFault
from torchship.serve.protocols._http1 import Connection
from torchship.serve.protocols._infer import Inference
from torchship.serve.protocols._routes import Route, Router
from torchship.serve.protocols._served import Served
from torchship.serve.protocols._site import Limits, Site
from torchship.wire.oip_json import Regions


class Listener:
    """An open port with its connections."""

    def __init__(self, site: Site, server: asyncio.Server) -> None:
        self._site, self._server = site, server
        self._clock: asyncio.TimerHandle | None = None
        self._tick()

    @property
    def port(self) -> int:
        """The port that is bound."""
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        self._site.tick(loop.time())
        self._clock = loop.call_later(1.0, self._tick)

    async def close(self, *, grace: float = 10.0) -> None:
        """Take no more connections, answer what is due for at most `grace` seconds, then hang up."""
        self._server.close()
        self._site.closing = True
        for connection in tuple(self._site.connections):
            connection.retire()
        if self._site.connections:
            self._site.empty = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._site.empty], timeout=grace)
        for connection in tuple(self._site.connections):
            connection.transport.abort()
        if self._clock is not None:
            self._clock.cancel()
        await asyncio.sleep(0)


async def listen(
    service: Served,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    limits: Limits | None = None,
    admit: Admit | None = None,
    tls: ssl.SSLContext | None = None,
    regions: Regions | None = None,
    forward_headers: str = "",
    routes: Sequence[Route] = (),
) -> Listener:
    """Serve HTTP until the listener is closed; `routes` adds endpoints of other faces to the same port.

    Raises Unavailable where the port cannot be bound.
    """
    everything = [*protocol_routes(service, regions=regions, forward_headers=forward_headers), *routes]
    site = Site(Router(everything), limits or Limits(), admit)
    loop = asyncio.get_running_loop()
    site.tick(loop.time())
    try:
        server = await loop.create_server(lambda: Connection(site), host, port, ssl=tls, backlog=1024)
    except OSError as fault:
        raise Unavailable(
            f"cannot listen on {host}:{port}: {fault.strerror}", hint="is it in use? choose another port"
        ) from None
    return Listener(site, server)


def protocol_routes(service: Served, *, regions: Regions | None = None, forward_headers: str = "") -> list[Route]:
    """The paths of the Open Inference Protocol, and /metrics."""
    inference = Inference(service, regions=regions, forward=forward_headers)
    routes = [
        Route("GET", "/v2", lambda exchange: exchange.answer_json(service.server_metadata())),
        Route("GET", "/v2/health/live", lambda exchange: _health(exchange, "live", service.live)),
        Route("GET", "/v2/health/ready", lambda exchange: _health(exchange, "ready", service.ready)),
        Route("GET", "/metrics", lambda exchange: _metrics(exchange, service), "metrics"),
        Route("GET", "/v2/models/stats", lambda exchange: exchange.answer_json(service.statistics()), "metrics"),
    ]
    for base in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        routes += [
            Route("POST", f"{base}/infer", inference, "infer"),
            Route("GET", base, lambda exchange: exchange.answer_json(service.model_metadata(*_which(exchange)))),
            Route("GET", f"{base}/ready", lambda exchange: _model_ready(exchange, service)),
            Route(
                "GET", f"{base}/config", lambda exchange: exchange.answer_json(service.model_config(*_which(exchange)))
            ),
            Route("GET", f"{base}/stats", lambda exchange: exchange.answer_json(service.statistics(*_which(exchange)))),
        ]
    return routes


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


__all__ = ["HttpFault", "Limits", "Listener", "Route", "listen", "protocol_routes"]
