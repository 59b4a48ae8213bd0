"""The catalog: every model that is served, its versions with their lines, and why one is not there."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from torchship.artifact import Store
from torchship.errors import NotFound, TorchshipError, Unavailable
from torchship.pipeline.describe import describe_apart
from torchship.pipeline.planning import plan
from torchship.serve.config import ModelConfig
from torchship.serve.line import Line

_log = logging.getLogger("torchship.serve")


@dataclass(slots=True)
class Version:
    """One version of a model. `state` is LOADING, READY, UNLOADING or UNAVAILABLE, as Triton spells them."""

    name: str
    line: Line | None = None
    state: str = "LOADING"
    reason: str = ""
    since: float = field(default_factory=time.time)


@dataclass(slots=True)
class Entry:
    """One model: its configuration and its versions; `current` is what a request without a version gets."""

    config: ModelConfig
    versions: dict[str, Version] = field(default_factory=dict)
    current: Line | None = None
    current_version: str = ""
    reason: str = "not loaded"


class Catalog:
    """Models by name."""

    def __init__(self, *, store: Store) -> None:
        self.store = store
        self.entries: dict[str, Entry] = {}

    def expect(self, config: ModelConfig) -> None:
        """A model that should be served, though it is not there yet: the server is not ready before it is."""
        self.entries.setdefault(config.name, Entry(config, reason="loading"))

    async def load(self, config: ModelConfig) -> None:
        """Open a model in fresh processes, warm it, switch to it, and drain what was there before.

        Raises what opening raises; then the old version goes on serving, and the index tells the reason.
        """
        entry = self.entries.setdefault(config.name, Entry(config))
        name = str(int(entry.current_version) + 1) if entry.current_version else "1"
        version = Version(name)
        entry.versions[name] = version
        try:
            planned = await asyncio.to_thread(plan, config.pipeline(), self.store, describing=describe_apart)
            version.line = await Line(planned, store=self.store, limits=config.limits()).open()
        except TorchshipError as fault:
            version.state, version.reason = "UNAVAILABLE", fault.line
            entry.reason = fault.line
            _log.error("model %s version %s did not open: %s", config.name, name, fault.line)
            raise
        version.state = "READY"
        old, old_name = entry.current, entry.current_version
        entry.current, entry.current_version, entry.config, entry.reason = version.line, name, config, ""
        _log.info("model %s version %s is ready", config.name, name)
        if old is not None:
            await self._retire(entry, old_name)

    async def _retire(self, entry: Entry, name: str) -> None:
        version = entry.versions[name]
        version.state = "UNLOADING"
        if version.line is not None:
            await version.line.drain()
            await version.line.close()
        version.line, version.state, version.reason = None, "UNAVAILABLE", "unloaded"

    async def unload(self, name: str) -> None:
        """Drain and close all versions of a model. Raises NotFound."""
        entry = self.entry(name)
        entry.current, entry.current_version, entry.reason = None, "", "unloaded"
        for version in list(entry.versions):
            await self._retire(entry, version)

    def entry(self, name: str) -> Entry:
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
        entry = self.entry(name)
        if not version or version == entry.current_version:
            if entry.current is None:
                raise Unavailable(f"model {name!r} is not ready: {entry.reason}", hint="try again later")
            return entry.current, entry.current_version
        found = entry.versions.get(version)
        if found is None:
            raise NotFound(
                f"Request for unknown model: '{name}' version {version} is not found",
                hint=f"there is {', '.join(entry.versions)}",
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

    async def drain(self, *, patience: float) -> None:
        """Take nothing more, and answer what is under way."""
        await asyncio.gather(*(line.drain(patience=patience) for line in self.lines().values()))

    async def close(self) -> None:
        """Stop all workers."""
        await asyncio.gather(*(line.close() for line in self.lines().values()))
