"""The host: reads the configuration, opens the models, listens, and stops without leaving anything behind."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import time
from collections.abc import Collection, Coroutine, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, Unpack

import msgspec
import uvloop

from torchship import hardware
from torchship.artifact import Store, open_artifact
from torchship.artifact.manifest import Manifest
from torchship.errors import BadConfig, TorchshipError
from torchship.process import resolve
from torchship.serve import config as configs
from torchship.serve import logs
from torchship.serve.access import check_places, gate
from torchship.serve.api import rest
from torchship.serve.api.front import Front
from torchship.serve.api.regions import SharedMemory
from torchship.serve.api.settings import Tracing
from torchship.serve.catalog import Catalog
from torchship.serve.config import Grpc, ModelConfig, Mount, ServerConfig
from torchship.serve.container import become_init, check_system_calls, room_for_connections
from torchship.serve.engine.launch import WorkerThread
from torchship.serve.engine.replica import LocalReplica
from torchship.serve.http.listen import Certificates, Listener
from torchship.serve.http.pool import ReceiverPool
from torchship.serve.http.router import Mounted
from torchship.serve.http.site import ConnectionLimits
from torchship.serve.metrics import peak
from torchship.serve.service import Service
from torchship.serve.systemd import ServiceSupervisor
from torchship.serve.tracing import HEADERS, Traces

_log = logging.getLogger("torchship.serve")


class Server:
    """A running server: its service and its listeners."""

    def __init__(self, config: ServerConfig) -> None:
        """Raises BadConfig for what would be open to everybody, or cannot be used."""
        check_places(config)
        if config.one_process and config.http.receivers:
            raise BadConfig("$.http.receivers: one process has no receivers", hint="leave out one of the two")
        self.config = config
        start = partial(LocalReplica, launch=WorkerThread) if config.one_process else LocalReplica
        self.catalog = Catalog(store=Store(config.store.root or None), start=start)
        self._traces = Traces(config.trace) if config.trace else None
        self.service = Service(self.catalog, name=config.name, control=config.control.repository, traces=self._traces)
        self.http: Listener | None = None
        self.grpc: Listener | None = None
        self.own: Listener | None = None
        self.receivers: ReceiverPool | None = None
        tls = config.tls
        self._certificates = Certificates(tls.certificate, key=tls.key, clients=tls.clients) if tls else None
        self._mounted: list[Mounted] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._reloads = asyncio.Lock()

    async def open(self) -> Server:
        """Bind the ports first, so that a taken one is told at once, then open all models.

        At a shared port it is the other way round: others answer there as long as we cannot.
        Raises Unavailable for a port, and what the first model that does not open raises.
        """
        for model in self.config.model:
            self.catalog.expect(model)
        try:
            if not self.config.http.shared:
                await self._listen()
            await asyncio.gather(*(self._load(model) for model in self.config.model))
            if self.config.http.shared:
                await self._listen()
        except BaseException:
            await self.close(patience=0.0)
            raise
        if self.config.store.watch:
            self._tasks.append(asyncio.ensure_future(self.catalog.watch(self.config.store.watch)))
        if self._certificates:
            self._tasks.append(asyncio.ensure_future(self._certificates.watch()))
        self._tasks += [asyncio.ensure_future(_beside(mounted.run())) for mounted in self._mounted if mounted.run]
        self._expect_memory()
        return self

    def _expect_memory(self) -> None:
        """Where memory matters, have it watched, and say what the models were measured with."""
        artifacts = [(model.name, one) for model in self.config.model for one in _manifests(model, self.catalog.store)]
        measured = [(name, one.timing.served) for name, one in artifacts if one.timing and one.timing.served]
        for name, served in measured:
            _log.info("%s was measured at %.1f MB in batches of %d", name, served.peak / 1e6, served.max_batch)
            if served.one_process and not self.config.one_process:
                _log.warning("%s was measured in one process: with --one-process it takes less memory", name)
        if len(measured) == len(self.config.model) == 1 and measured[0][1].one_process == self.config.one_process:
            peak.expected = measured[0][1].peak
        if measured or self.config.one_process:
            self._tasks.append(asyncio.ensure_future(peak.watch()))

    async def _load(self, model: ModelConfig) -> None:
        try:
            await self.catalog.load(model)
        except TorchshipError as fault:
            fault.args = (f"model {model.name!r}: {fault}",)
            raise

    async def _listen(self) -> None:
        config, control, http, tls = self.config, self.config.control, self.config.http, self.config.tls
        front = Front(
            self.service,
            regions=SharedMemory() if control.shared_memory else None,
            tracing=Tracing(folder=Path(control.trace_folder) if control.trace_folder else None),
            scheme="https" if tls else "http",
            guarded=bool(config.token),
            drain=self.drain,
            forward="|".join(filter(None, (http.forward_headers, HEADERS if self._traces else ""))),
        )
        cards = on_cards(config, self.catalog.store)
        room = room_for_connections(most_workers(config, cards))
        if count := default_receivers(cards) if http.receivers is None else http.receivers:
            self.receivers = await ReceiverPool(count, files=msgspec.structs.astuple(tls) if tls else None).open()
        limits = msgspec.convert(http, ConnectionLimits, from_attributes=True)
        given: dict[str, Any] = {
            "admit": gate(config.token),
            "receivers": self.receivers,
            "thrifty": config.one_process,
            "tls": self._certificates.context if self._certificates else None,
            "limits": msgspec.structs.replace(limits, connections=room),
        }
        self._mounted = [_mounted(mount, self.service) for mount in config.mount]
        routes = [route for mounted in self._mounted for route in mounted.routes]
        self.service.measured += [mounted.metrics for mounted in self._mounted if mounted.metrics]
        rest_only = {"host": http.host, "routes": routes, "cors_origins": http.cors_origins, **given}
        self.http = await rest.listen(front, port=http.port, shared=http.shared, **rest_only)
        if http.own_port is not None:
            self.own = await rest.listen(front, port=http.own_port, **rest_only)
        if config.grpc:
            host, port = config.grpc.host or http.host, config.grpc.port
            self.grpc = await rest.listen(front, host=host, port=port, shared=http.shared, grpc_only=True, **given)

    @property
    def url(self) -> str:
        """Where REST listens."""
        port = self.http.port if self.http else self.config.http.port
        host = self.config.http.host
        return f"{'https' if self.config.tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"

    @property
    def _listeners(self) -> list[Listener]:
        return [listener for listener in (self.http, self.own, self.grpc) if listener]

    async def drain(self, *, patience: float | None = None) -> None:
        """Two steps, so that balancers notice first: for `drain_delay` seconds not ready, but taking requests; then
        taking none, until all that was begun is answered: as long as its own time-outs allow, or for `patience`
        seconds."""
        if not self.service.draining:
            self.service.draining = True
            for listener in self._listeners:
                listener.drain()
            await asyncio.sleep(0.0 if patience == 0 else self.config.http.drain_delay)
        await self.catalog.drain(patience=patience)

    def look(self) -> tuple[str, str]:
        """What hangs and cannot be ended, empty where nothing does, and how the server is, in words."""
        stuck = self.catalog.stuck(time.monotonic())
        stuck += [f"a call of stage {name} hangs, and a thread cannot be ended" for name in WorkerThread.stuck()]
        names = list(self.catalog.entries)
        away = [name for name in names if not self.service.model_ready(name)]
        status = f"not ready: {', '.join(away)}" if away else f"serving {', '.join(names)} at {self.url}"
        return "; ".join(stuck), "finishing what is under way" if self.service.draining else status

    async def reload(self, manager: ServiceSupervisor) -> None:
        """Load what has changed in the store now, and tell the service manager from when to when."""
        async with self._reloads:
            manager.reloading()
            await self.catalog.refresh()
            manager.tell("READY=1")

    async def close(self, *, patience: float | None = None) -> None:
        """Drain, stop the workers, close the ports."""
        grace = 5.0 if patience is None else min(patience, 5.0)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if peak.most:
            _log.info("peak memory %.1f MB of all processes", peak.most / 1e6)
        await self.drain(patience=patience)
        await asyncio.gather(*(listener.close(grace=grace) for listener in self._listeners))
        if self.receivers:
            await self.receivers.close()
        await self.catalog.close(grace=grace)
        if self._traces:
            await asyncio.to_thread(self._traces.close)


def _mounted(mount: Mount, service: Service) -> Mounted:
    try:
        found = resolve(mount.run)(service, **mount.options)
    except (ImportError, AttributeError, TypeError) as fault:
        raise BadConfig(
            f"$.mount: {mount.run}: {fault}", hint="module:function(service, ...) that returns routes"
        ) from None
    return found if isinstance(found, Mounted) else Mounted(found)


async def _beside(work: Coroutine[Any, Any, None]) -> None:
    """The work of a mount: a fault ends it, not the server."""
    try:
        await work
    except Exception:
        _log.exception("a mount's work has failed; the models are served on")


def default_receivers(cards: Collection[str]) -> int:
    """A quarter of the cores, at most four, where models run on `cards`: there one process cannot receive as much as
    its worker takes. None elsewhere: the workers need the cores."""
    return min(4, hardware.cores() // 4) if cards else 0


def most_workers(config: ServerConfig, cards: Collection[str]) -> int:
    """How many workers there may be: all copies, and a spare one where a stage with one copy keeps one, as models on
    `cards` do by default."""
    found = 0
    for model in config.model:
        spares = model.name in cards if model.spare is None else model.spare
        found += sum(stage.copies + (spares and stage.copies == 1) for stage in model.pipeline().stages)
    return found


def on_cards(config: ServerConfig, store: Store) -> set[str]:
    """The names of the models of which a stage asks for a card, or an artifact was made for one."""
    return {model.name for model in config.model if any(one.startswith("cuda") for one in _devices(model, store))}


def _devices(model: ModelConfig, store: Store) -> Iterator[str]:
    yield from (device for stage in model.pipeline().stages for device in stage.devices)
    yield from (str(manifest.recipe.options.get("device")) for manifest in _manifests(model, store))


def _manifests(model: ModelConfig, store: Store) -> Iterator[Manifest]:
    """What a model's artifacts say of themselves; one that cannot be read is told when it is loaded."""
    for stage in model.pipeline().stages:
        with suppress(TorchshipError):
            if stage.artifact:
                yield open_artifact(store.resolve(stage.artifact), verify=False).manifest


class ServeOptions(TypedDict, total=False):
    """What a command line may say beside its targets; it wins over the file.

    `trust` allows native code in the artifacts that are named; a file says so itself.
    """

    http_host: str
    http_port: int
    grpc_port: int
    receivers: int
    one_process: bool
    store: str
    log_level: str
    log_format: str
    trust: bool


def configure(*targets: str, **options: Unpack[ServeOptions]) -> ServerConfig:
    """The configuration for command line targets: one TOML file, or artifacts (names in the store, or folders).

    Raises BadConfig, NotFound.
    """
    if unknown := options.keys() - ServeOptions.__annotations__.keys():
        raise BadConfig(
            f"no option {', '.join(sorted(unknown))}", hint=f"there is {', '.join(ServeOptions.__annotations__)}"
        )
    files = [target for target in targets if target.endswith(".toml")]
    trust = options.get("trust", False)
    if not targets or (files and len(targets) > 1):
        raise BadConfig("give one configuration file, or artifacts", hint="torchship serve serve.toml")
    if files and trust:
        raise BadConfig("trust is said in the file, for each model", hint="write trust = true into its [[model]]")
    if files:
        config = configs.read(files[0])
    else:  # `classify@3` is served as classify, a folder under the name in its manifest
        names = [
            open_artifact(target, verify=False).manifest.name if os.sep in target else target.partition("@")[0]
            for target in targets
        ]
        given = zip(names, targets, strict=True)
        models = [{"name": name, "artifact": target, "trust": trust} for name, target in given]
        config = configs.convert({"model": models})
    change, http, rpc, log = msgspec.structs.replace, config.http, config.grpc, config.log
    if (port := options.get("grpc_port")) is not None:
        rpc = Grpc(port, rpc.host if rpc else "")
    root = str(Path(options["store"]).resolve()) if options.get("store") else config.store.root
    return change(
        config,
        http=change(
            http,
            host=options.get("http_host") or http.host,
            port=options.get("http_port", http.port),
            receivers=options.get("receivers", http.receivers),
        ),
        grpc=rpc,
        one_process=options.get("one_process") or config.one_process,
        store=change(config.store, root=root),
        log=change(log, level=options.get("log_level") or log.level, format=options.get("log_format") or log.format),
    )


def serve(*targets: str | Mapping[str, Any], **options: Unpack[ServeOptions]) -> int:
    """Serve a TOML configuration or artifacts until a signal says stop; the exit code.

    A mapping is the configuration as plain data: what a TOML file would hold. It stands alone, without options.
    Raises BadConfig, NotFound, Unavailable (a port in use), and what a model raises that does not open.
    """
    files = [target for target in targets if isinstance(target, str)]
    if len(files) == len(targets):
        config = configure(*files, **options)
    elif len(targets) > 1 or options:
        raise BadConfig("a configuration as data stands alone", hint="write the options into it")
    else:
        config = configs.convert(targets[0])
    if config.one_process:
        hardware.keep_no_freed_memory()
    become_init()
    check_system_calls()
    logs.begin(config.log)
    return uvloop.run(_run(config))


def _announce(server: Server) -> None:
    """Log what is served where."""
    config = server.config
    if server.grpc and config.grpc:
        host = config.grpc.host or config.http.host
        _log.info("gRPC at %s:%d, and at %s", host, server.grpc.port, server.url)
    if config.one_process:
        _log.warning("one process: a model that crashes ends this server, and one that hangs cannot be ended")
    for name in server.catalog.entries:
        _log.info("serving %s at %s/v2/models/%s", name, server.url, name)


async def _run(config: ServerConfig) -> int:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    me = asyncio.current_task()
    manager, server = ServiceSupervisor(), Server(config)
    manager.tell(f"STATUS=opening {', '.join(model.name for model in config.model)}")
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
            manager.tell("STOPPING=1")
            _log.info("%s: no new requests, finishing what is under way", number.name)
            stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ask, number)
    beside: set[asyncio.Task[None]] = set()
    waiting = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait([opening, waiting], return_when=asyncio.FIRST_COMPLETED)
        if not opening.done():
            opening.cancel()
            await asyncio.gather(opening, return_exceptions=True)
            return 130 if interrupts else 0
        opening.result()
        gc.collect()  # what is there now stays: it need not be looked at again, nor after every 700 new objects
        gc.freeze()
        gc.set_threshold(20_000, 20, 50)
        _announce(server)
        if manager.there:  # elsewhere SIGHUP says that the terminal is gone
            manager.tell("READY=1")
            beside.add(asyncio.ensure_future(manager.attend(server.look)))
            loop.add_signal_handler(signal.SIGHUP, lambda: beside.add(asyncio.ensure_future(server.reload(manager))))
        await waiting
        await server.close()
        return 0
    except asyncio.CancelledError:
        await server.close(patience=0.0)
        return 130
    finally:
        for task in (waiting, *beside):
            task.cancel()
