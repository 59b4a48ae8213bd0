"""The host: reads the configuration, opens the models, listens, and stops without leaving anything behind."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from pathlib import Path

import msgspec
import uvloop

from torchship.artifact import Store, open_artifact
from torchship.errors import BadConfig, TorchshipError
from torchship.process import resolve
from torchship.serve import config as configs
from torchship.serve.catalog import Catalog
from torchship.serve.config import Http, ModelConfig, ServerConfig, StorePlace
from torchship.serve.protocols import rest
from torchship.serve.service import Service

_log = logging.getLogger("torchship.serve")


class Server:
    """A running server: its service and its listeners."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.catalog = Catalog(store=Store(config.store.root or None))
        self.service = Service(self.catalog)
        self.http: rest.Listener | None = None

    async def open(self) -> Server:
        """Bind the ports first, so that a taken one is told at once, then open all models.

        Raises Unavailable for a port, and what the first model that does not open raises.
        """
        try:
            http = self.config.http
            mounts = self.config.mount
            routes = [route for mount in mounts for route in resolve(mount.run)(self.service, **mount.options)]
            self.http = await rest.listen(self.service, host=http.host, port=http.port, routes=routes)
            for model in self.config.model:
                self.catalog.expect(model)
            await asyncio.gather(*(self.catalog.load(model) for model in self.config.model))
        except BaseException:
            await self.close(patience=0.0)
            raise
        return self

    @property
    def url(self) -> str:
        """Where REST listens."""
        port = self.http.port if self.http else self.config.http.port
        return f"http://{self.config.http.host}:{port}"

    async def close(self, *, patience: float = 30.0) -> None:
        """Tell that we are not ready, answer what is under way, stop the workers, close the ports."""
        self.service.draining = True
        await self.catalog.drain(patience=patience)
        if self.http:
            await self.http.close(grace=min(patience, 5.0))
        await self.catalog.close()


def configure(
    *targets: str, http_host: str = "", http_port: int | None = None, store: str = "", log_level: str = ""
) -> ServerConfig:
    """The configuration for command line targets: one TOML file, or artifacts (names in the store, or folders).

    Raises BadConfig, NotFound.
    """
    files = [target for target in targets if target.endswith(".toml")]
    if not targets or (files and len(targets) > 1):
        raise BadConfig("give one configuration file, or artifacts", hint="torchship serve serve.toml")
    if files:
        config = configs.read(files[0])
    else:
        models = tuple(ModelConfig(name=_name(target), artifact=target) for target in targets)
        config = ServerConfig(model=models)
        configs.check(config)
    http = Http(http_host or config.http.host, config.http.port if http_port is None else http_port)
    place = StorePlace(str(Path(store).resolve())) if store else config.store
    log = msgspec.structs.replace(config.log, level=log_level) if log_level else config.log
    return msgspec.structs.replace(config, http=http, store=place, log=log)


def _name(target: str) -> str:
    """`classify@3` and `/models/classify/3` are both served as classify: a folder by the name in its manifest."""
    if "/" in target:
        return open_artifact(target, verify=False).manifest.name
    return target.partition("@")[0]


def serve(
    *targets: str, http_host: str = "", http_port: int | None = None, store: str = "", log_level: str = ""
) -> int:
    """Serve a TOML configuration or artifacts until a signal says stop; the exit code.

    Raises BadConfig, NotFound, Unavailable (a port in use), and what a model raises that does not open.
    """
    config = configure(*targets, http_host=http_host, http_port=http_port, store=store, log_level=log_level)
    return run(config)


def run(config: ServerConfig) -> int:
    """The same for a configuration at hand."""
    logging.basicConfig(
        level=config.log.level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s"
    )
    return uvloop.run(_run(config))


async def _run(config: ServerConfig) -> int:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    me = asyncio.current_task()
    server = Server(config)
    opening = asyncio.ensure_future(server.open())
    interrupts = 0

    def ask(number: signal.Signals) -> None:
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        if interrupts > 1:
            _log.warning("stopping now")
            if me is not None:
                me.cancel()
        elif not stop.is_set():
            _log.info("%s: no new requests, finishing what is under way", number.name)
            stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ask, number)
    waiting = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait([opening, waiting], return_when=asyncio.FIRST_COMPLETED)
        if not opening.done():
            opening.cancel()
            await asyncio.gather(opening, return_exceptions=True)
            return 130 if interrupts else 0
        opening.result()
        _announce(server)
        await waiting
        await server.close()
        return 0
    except asyncio.CancelledError:
        await server.close(patience=0.0)
        return 130
    finally:
        waiting.cancel()


def _announce(server: Server) -> None:
    for entry in server.catalog.entries.values():
        _log.info("serving %s at %s/v2/models/%s", entry.config.name, server.url, entry.config.name)


__all__ = ["Server", "TorchshipError", "configure", "run", "serve"]
