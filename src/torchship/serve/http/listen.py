"""An open port: binds it, gives each connection its protocol, ticks its clock, and closes it in peace; and its TLS."""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from pathlib import Path
from typing import Any, Protocol

from torchship.errors import BadConfig, Unavailable
from torchship.serve.http.site import Site

_log = logging.getLogger("torchship.serve")
HANDSHAKE = 10.0  # seconds


class Listener(Protocol):
    """An open port."""

    @property
    def port(self) -> int:
        """The port that is bound."""

    def drain(self) -> None:
        """Take requests as before, but let callers come back by new connections, which may lead to another server."""

    async def close(self, *, grace: float = 10.0) -> None:
        """Take no more connections, answer what is due for at most `grace` seconds, then hang up."""


class LocalListener:
    """A Listener whose connections are run in this process; Listener says what its methods do."""

    def __init__(self, site: Site, server: asyncio.Server) -> None:
        self._site, self._server = site, server
        self._clock: asyncio.TimerHandle | None = None
        self.port = int(server.sockets[0].getsockname()[1])
        self._tick()

    def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        self._site.tick(loop.time())
        self._clock = loop.call_later(1.0, self._tick)

    def drain(self) -> None:
        self._site.drain()

    async def close(self, *, grace: float = 10.0) -> None:
        self._server.close()
        await self._site.close(grace=grace)
        if self._clock is not None:
            self._clock.cancel()
        await asyncio.sleep(0)


async def bind(
    site: Site,
    protocol: Any,
    *,
    host: str,
    port: int,
    tls: ssl.SSLContext | None = None,
    shared: bool = False,
    serve: bool = True,
) -> asyncio.Server:
    """Bind, on a `shared` port together with others, and listen where it should `serve`. Raises Unavailable where the
    port cannot be bound."""
    loop = asyncio.get_running_loop()
    site.tick(loop.time())
    try:
        return await loop.create_server(
            lambda: protocol(site), host, port, ssl=tls, ssl_handshake_timeout=HANDSHAKE if tls else None,
            backlog=1024, reuse_port=shared, start_serving=serve,
        )  # fmt: skip
    except OSError as fault:
        text = f"cannot listen on {host}:{port}: {fault.strerror}"
        raise Unavailable(text, hint="is it in use? choose another port") from None


def tls_context(certificate: Path | str, *, key: Path | str, clients: Path | str = "") -> ssl.SSLContext:
    """A context that offers HTTP/2 and HTTP/1.1, TLS 1.2 or newer.

    `clients` is a file of certificate authorities: then only callers with a certificate of theirs get in (mTLS).
    Raises BadConfig naming the file that cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["h2", "http/1.1"])
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as fault:
        raise BadConfig(
            f"tls: cannot use {certificate} with {key}: {fault}", hint="PEM files that belong together"
        ) from None
    if clients:
        try:
            context.load_verify_locations(clients)
        except (OSError, ssl.SSLError) as fault:
            raise BadConfig(f"tls: cannot use {clients}: {fault}", hint="a PEM file of certificates") from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


class Certificates:
    """A certificate that may be renewed in place: `context` serves new connections with what the files hold then."""

    def __init__(self, certificate: Path | str, *, key: Path | str, clients: Path | str = "") -> None:
        """Raises BadConfig naming the file that cannot be used."""
        self._certificate, self._key, self._clients = certificate, key, clients
        self._seen = self._stamps()
        self.context = self._now = tls_context(certificate, key=key, clients=clients)
        self.context.sni_callback = self._choose  # called whether the peer names a server or not

    def _choose(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        connection.context = self._now

    def _stamps(self) -> list[tuple[int, int, int]]:
        found = [
            os.stat(file) for file in (self._certificate, self._key, self._clients) if file and os.path.exists(file)
        ]
        return [(one.st_mtime_ns, one.st_size, one.st_ino) for one in found]

    def renew(self) -> None:
        """Look at the files again. A pair that does not belong together, perhaps half-written, keeps the old one."""
        stamps = self._stamps()
        if stamps == self._seen:
            return
        self._seen = stamps
        try:
            self._now = tls_context(self._certificate, key=self._key, clients=self._clients)
        except BadConfig as fault:
            _log.warning("the certificate is not renewed: %s", fault)
        else:
            _log.info("new connections get the renewed certificate")

    async def watch(self, seconds: float = 5.0) -> None:
        """Renew again and again. Runs until it is cancelled."""
        while True:
            await asyncio.sleep(seconds)
            self.renew()
