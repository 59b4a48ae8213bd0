"""The catalog: every model that is served, its versions with their lines, and why one is not there.

Which versions a model should have, and out of which files, is found in the store, without opening anything.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import msgspec

from torchship import hardware
from torchship.artifact import Store, open_artifact
from torchship.artifact.manifest import BatchPoint
from torchship.errors import NotFound, StageFailed, TorchshipError, Unavailable
from torchship.pipeline.config import PipelineConfig
from torchship.pipeline.opening import describe_apart
from torchship.pipeline.planning import Node, Plan, plan
from torchship.serve.config import ModelConfig, card_of, claimed_shares
from torchship.serve.engine.line import Line
from torchship.serve.engine.replica import LocalReplica, StartReplica
from torchship.stages.labels import read_labels

_log = logging.getLogger("torchship.serve")
_WAIT = 5.0  # seconds that a load waits for the old version, which may take as long as its requests
_KEPT = 8  # versions that are gone and still listed in the index


@dataclass(frozen=True)
class Wanted:
    """One version: its number where the store has one (else empty), its pipeline, and the folder of each artifact.

    Two of them with equal `files` would serve the same.
    """

    number: str
    pipeline: PipelineConfig
    files: tuple[str, ...]


@dataclass(slots=True)
class Version:
    """One version of a model. `state` is LOADING, READY, UNLOADING or UNAVAILABLE, as Triton spells them."""

    name: str
    files: tuple[str, ...] = ()
    line: Line | None = None
    state: str = "LOADING"
    reason: str = ""

    def serves(self, wish: Wanted) -> bool:
        """Whether it is open, and out of the same files."""
        return self.line is not None and self.files == wish.files and wish.number in ("", self.name)


@dataclass(slots=True)
class CatalogEntry:
    """One model: its configuration and its versions; `current` is what a request without a version gets, unless
    `shares` say how such requests are shared out.

    `given` is the configuration of the server's file, which a caller who loads the model may have changed since.
    """

    config: ModelConfig
    given: ModelConfig
    versions: dict[str, Version] = field(default_factory=dict)
    current: Line | None = None
    current_version: str = ""
    shares: dict[str, float] = field(default_factory=dict)
    shadow: Line | None = None
    reason: str = "loading"
    tried: tuple[tuple[str, ...], ...] = ()
    busy: asyncio.Lock = field(default_factory=asyncio.Lock)


class Catalog:
    """Models by name."""

    def __init__(self, *, store: Store, start: StartReplica = LocalReplica) -> None:
        """`start` makes the replicas of every line."""
        self.store, self._start = store, start
        self.entries: dict[str, CatalogEntry] = {}
        self._turns = asyncio.Semaphore(hardware.cores())
        self._retiring: dict[asyncio.Task[None], Line] = {}

    def expect(self, config: ModelConfig) -> None:
        """A model that should be served, though it is not there yet: the server is not ready before it is."""
        self.entries.setdefault(config.name, CatalogEntry(config, config))

    async def load(self, config: ModelConfig, *, fresh: bool = True) -> None:
        """Open the wanted versions in fresh processes, warm them, switch over, and drain what is not wanted any more.

        `fresh` opens again what is open already. Raises what opening raises; then the old version goes on serving,
        and the index tells the reason.
        """
        self.expect(config)
        entry = self.entries[config.name]
        async with entry.busy:
            try:
                claimed = self._claimed(config)
                plans = await asyncio.to_thread(wanted, config, self.store)
            except TorchshipError as fault:
                entry.reason = fault.line
                raise
            entry.tried = tuple(version.files for version in plans)
            opened: dict[str, Version] = {}
            for version in plans:
                same = [] if fresh else [known for known in entry.versions.values() if known.serves(version)]
                now = same[0] if same else await self._open(entry, config, version, claimed)
                opened[now.name] = now
            await self._switch(entry, config, opened)

    def _claimed(self, config: ModelConfig) -> dict[str, float]:
        """The shares of cards that are claimed with this configuration of one model beside the others."""
        others = [known.config for name, known in self.entries.items() if name != config.name]
        return claimed_shares([*(other for other in others if self.entries[other.name].reason != "unloaded"), config])

    async def _open(
        self, entry: CatalogEntry, config: ModelConfig, version: Wanted, claimed: Mapping[str, float]
    ) -> Version:
        name = version.number or "1"  # what is not in a store has no versions
        made = Version(name, version.files)
        before = entry.versions.get(name)
        if before is None or before.line is None:
            entry.versions[name] = made
        try:
            names = await asyncio.to_thread(read_labels, config.labels)
            plan = await asyncio.to_thread(lay_out, version, self.store, target=config.latency_target, labels=names)
            plan = replace(plan, nodes=tuple(bounded(node, claimed) for node in plan.nodes))
            line = Line(plan, store=self.store, limits=config.limits(), turns=self._turns, start=self._start)
            made.line = await line.open()
        except Exception as fault:
            ours = isinstance(fault, TorchshipError)
            error = fault if isinstance(fault, TorchshipError) else StageFailed(f"cannot open: {fault}")
            made.state, made.reason = "UNAVAILABLE", error.line
            if before is not None and before.line is not None:
                before.reason = f"reload failed: {error.line}"
            if entry.current is None:
                entry.reason = error.line
            if entry.current is not None or not ours:  # else whoever starts the server is told
                _log.error("model %s version %s: %s", config.name, name, error.line, exc_info=None if ours else fault)
            raise error from None
        made.state = "READY"
        return made

    async def _switch(self, entry: CatalogEntry, config: ModelConfig, opened: dict[str, Version]) -> None:
        """One turn of the loop: from here on requests go to what was opened; the rest is drained."""
        gone = [known for known in entry.versions.values() if known.line is not None and known not in opened.values()]
        replaced = [known for known in gone if known.name in opened]
        entry.versions |= opened
        name, last = list(opened.items())[-1]
        entry.current, entry.current_version, entry.config, entry.reason = last.line, name, config, ""
        weights = config.versions.weights.items()
        entry.shares = {known: share for known, share in weights if known in opened and share > 0}
        shadow = entry.versions.get(config.versions.shadow)
        entry.shadow = shadow.line if shadow else None
        _log.info("model %s serves version %s", config.name, ", ".join(opened))
        await self._retire(gone)
        left = [known.name for known in entry.versions.values() if known.line is None and known not in replaced]
        for old in left[:-_KEPT]:
            del entry.versions[old]

    async def _retire(self, versions: Iterable[Version]) -> None:
        """Let versions finish what they have, for as long as its time-outs allow, and leave; wait a while for it."""
        for version in versions:
            line, version.state = version.line, "UNLOADING"
            if line is not None:
                task = asyncio.ensure_future(self._finish(version, line))
                self._retiring[task] = line
                task.add_done_callback(self._retiring.pop)
        if self._retiring:
            await asyncio.wait(self._retiring, timeout=_WAIT)

    @staticmethod
    async def _finish(version: Version, line: Line) -> None:
        await line.drain()
        version.line, version.state, version.reason = None, "UNAVAILABLE", "unloaded"
        await line.close()

    async def unload(self, name: str) -> None:
        """Drain and close all versions of a model. Raises NotFound."""
        entry = self.entry(name)
        async with entry.busy:
            entry.current, entry.current_version, entry.reason = None, "", "unloaded"
            entry.shares, entry.shadow = {}, None
            await self._retire([known for known in entry.versions.values() if known.line])

    async def watch(self, seconds: float) -> None:
        """Look into the store again and again, and load what has changed there. Runs until it is cancelled."""
        while True:
            await asyncio.sleep(seconds)
            await self.refresh()

    async def refresh(self) -> None:
        """Load what has changed in the store. What cannot be loaded stays as it is, as the log and the index tell."""
        for entry in list(self.entries.values()):
            if entry.reason == "unloaded":
                continue
            try:
                found = await asyncio.to_thread(wanted, entry.config, self.store)
                if tuple(version.files for version in found) != entry.tried:
                    await self.load(entry.config, fresh=False)
            except TorchshipError as fault:
                _log.debug("watching %s: %s", entry.config.name, fault.line)

    def entry(self, name: str) -> CatalogEntry:
        """A model. Raises NotFound."""
        try:
            return self.entries[name]
        except KeyError:
            known = ", ".join(self.entries) or "none"
            raise NotFound(
                f"Request for unknown model: '{name}' is not found", hint=f"this server has {known}"
            ) from None

    def line(self, name: str, version: str = "") -> tuple[Line, str]:
        """The line for a request, and the version that it is. Raises NotFound, Unavailable."""
        entry = self.entries.get(name) or self.entry(name)
        if not version and entry.current is not None and not entry.shares:
            return entry.current, entry.current_version
        if not version:
            if entry.current is None:
                raise Unavailable(f"model {name!r} is not ready: {entry.reason}", hint="try again later")
            version = entry.current_version
            if entry.shares:
                (version,) = random.choices([*entry.shares], [*entry.shares.values()])  # noqa: S311  # no secret
        found = entry.versions.get(version)
        if found is None:
            raise NotFound(
                f"Request for unknown model: '{name}' version {version} is not found",
                hint=f"there is {', '.join(entry.versions) or 'none yet'}",
            )
        if found.line is None:
            raise Unavailable(f"model {name!r} version {version} is not ready: {found.reason or found.state}")
        return found.line, version

    def lines(self) -> Mapping[tuple[str, str], Line]:
        """All open lines by model and version."""
        return {
            (name, version.name): version.line
            for name, entry in self.entries.items()
            for version in entry.versions.values()
            if version.line is not None
        }

    def stuck(self, now: float) -> list[str]:
        """What hangs though its station has killed it; every line is asked, those that are being retired too."""
        lines = {*self.lines().values(), *self._retiring.values()}
        return [words for line in lines for station in line.stations for words in station.stuck(now)]

    async def drain(self, *, patience: float | None = None) -> None:
        """Take nothing more, and answer what is under way, within `patience` seconds or as long as it may take."""
        lines = {*self.lines().values(), *self._retiring.values()}
        await asyncio.gather(*(line.drain(patience=patience) for line in lines))

    async def close(self, *, grace: float = 5.0) -> None:
        """Stop all workers; each may end what it runs, within `grace` seconds."""
        lines = {*self.lines().values(), *self._retiring.values()}
        for task in list(self._retiring):
            task.cancel()
        await asyncio.gather(*(line.close(grace=grace) for line in lines))


def wanted(config: ModelConfig, store: Store) -> list[Wanted]:
    """The versions that a model should have, the current one last. Raises NotFound, BadConfig."""
    if not config.artifact or os.sep in config.artifact or config.artifact.startswith("."):
        pipeline = config.pipeline()
        return [Wanted("", pipeline, _files(pipeline, store))]
    name = config.artifact.partition("@")[0]
    numbers = _numbers(config, store, name)
    found = []
    for number in numbers:
        pipeline = msgspec.structs.replace(config, artifact=f"{name}@{number}").pipeline()
        found.append(Wanted(str(number), pipeline, _files(pipeline, store)))
    return found


def _numbers(config: ModelConfig, store: Store, name: str) -> list[int]:
    policy = config.versions
    there = list(store.versions(name))
    if policy.all:
        numbers = there
    elif policy.listed:
        numbers = sorted(policy.listed)
    elif policy.latest:
        numbers = there[-policy.latest :]
    else:
        return [int(store.resolve(config.artifact).name)]
    missing = [number for number in numbers if number not in there]
    if missing or not numbers:
        raise NotFound(f"{name} has no version {missing or ''}", hint=f"it has {', '.join(map(str, there)) or 'none'}")
    return numbers


def _files(pipeline: PipelineConfig, store: Store) -> tuple[str, ...]:
    return tuple(str(store.resolve(stage.artifact).resolve()) for stage in pipeline.stages if stage.artifact)


def lay_out(version: Wanted, store: Store, *, target: float = 0.0, labels: Sequence[str] = ()) -> Plan:
    """The plan of a version. It pins artifacts to folders, those of a published pipeline's own stages too, so that a
    worker that is replaced opens the same files again.

    Where nothing else is said, a model's largest batch comes from its measured curve; `target` is a latency in seconds.
    `labels` name its classes, instead of those of the artifact.
    """
    made = plan(version.pipeline, store, describing=describe_apart)
    nodes = tuple(_batched(node, target) if node.config.artifact else node for node in made.nodes)
    return replace(made, nodes=nodes, labels=tuple(labels) or made.labels)


def _batched(node: Node, target: float) -> Node:
    timing = open_artifact(node.config.artifact, verify=False).manifest.timing
    if timing is None or node.config.max_batch or not node.signature.batched:
        return node
    return replace(node, max_batch=best_batch(timing.curve, most=node.max_batch, target=target))


def bounded(node: Node, claimed: Mapping[str, float]) -> Node:
    """A stage that has no share of its card gets what others leave of it; cards that nobody claims are open to all."""
    left = 1 - max((claimed.get(card_of(device), 0.0) for device in node.config.devices), default=0.0)
    if not node.config.artifact or node.config.memory_share or left == 1:
        return node
    return replace(node, config=msgspec.structs.replace(node.config, memory_share=max(left, 1e-6)))


def best_batch(curve: Sequence[BatchPoint], *, most: int, target: float = 0.0) -> int:
    """The smallest batch with 95 % of the best throughput, among those that keep to half of `target` seconds.

    Half, because a request waits for the batch before its own. `most` where nothing was measured.
    """
    points = [point for point in curve if point.batch <= most]
    if target:
        points = [point for point in points if point.p90_ms <= target * 500] or points[:1]
    if not points:
        return most
    best = max(point.rows_per_s for point in points)
    chosen = min(point.batch for point in points if point.rows_per_s >= 0.95 * best)
    largest = max(point.batch for point in points)
    return most if chosen == largest and not target else chosen
