"""The Open Inference Protocol over gRPC with Triton's extensions, health checks and reflection."""

from __future__ import annotations

import ssl
from collections.abc import Mapping

from torchship.serve.api.front import Front
from torchship.serve.api.reflection import reflection_rpcs
from torchship.serve.api.rpcs import protocol_rpcs
from torchship.serve.api.served import Served
from torchship.serve.http.exchange import Admit
from torchship.serve.http.http2.connection import Connection2
from torchship.serve.http.listen import Listener, bind
from torchship.serve.http.router import Router
from torchship.serve.http.site import Limits, Rpc, Site


async def listen(
    service: Served,
    *,
    host: str = "127.0.0.1",
    port: int = 8001,
    limits: Limits | None = None,
    admit: Admit | None = None,
    tls: ssl.SSLContext | None = None,
    shared: bool = False,
    front: Front | None = None,
) -> Listener:
    """Serve gRPC until the listener is closed. Raises Unavailable where the port cannot be bound."""
    site = Site(Router(()), limits or Limits(), admit, rpcs=all_rpcs(front or Front(service)))
    return await bind(site, Connection2, host=host, port=port, tls=tls, shared=shared)


def all_rpcs(front: Front) -> Mapping[str, Rpc]:
    """Every method by its path."""
    return {**protocol_rpcs(front), **reflection_rpcs()}
