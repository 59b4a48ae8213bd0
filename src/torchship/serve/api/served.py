"""What a protocol sees of the server: everything else about models, workers and versions stays behind this."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Protocol, TypeAlias

from torchship.wire.messages import Request, Response

Answer: TypeAlias = Callable[[Any, Request, Response | Exception], None]


class Begun(Protocol):
    """An inference that was begun."""

    def cancel(self) -> object:
        """Nobody waits for it any more."""
        ...


class Served(Protocol):
    """The Service as protocols use it. Model and version are given as in a URL; an empty version is the current one.

    Every method raises NotFound for an unknown model or version.
    """

    @property
    def live(self) -> bool:
        """Whether the process can do anything at all."""
        ...

    @property
    def ready(self) -> bool:
        """Whether every model that should be served answers."""
        ...

    def submit(self, request: Request) -> asyncio.Future[Response]:
        """Begin one inference, without a Task: a synchronous call. It may raise, or the future may fail."""
        ...

    def start(self, request: Request, answer: Answer, whom: Any) -> Begun:
        """The same without a future: `answer(whom, request, response or error)` is called once, perhaps at once."""
        ...

    def stream(self, request: Request) -> AsyncIterator[Response]:
        """All answers of a model that streams, or the one answer of one that does not."""
        ...

    def server_metadata(self) -> dict[str, Any]:
        """`name`, `version`, `extensions`."""
        ...

    def model_ready(self, name: str, version: str = "") -> bool:
        """Whether this model answers now."""
        ...

    def model_metadata(self, name: str, version: str = "") -> dict[str, Any]:
        """`name`, `versions`, `platform`, `inputs`, `outputs` and, beyond the protocol, `parameters`."""
        ...

    def model_config(self, name: str, version: str = "") -> dict[str, Any]:
        """Triton's model configuration, as far as it has a meaning here."""
        ...

    def statistics(self, name: str = "", version: str = "") -> dict[str, Any]:
        """`model_stats` as in Triton's statistics extension, of one model or of all."""
        ...

    def metrics(self) -> str:
        """Everything measured, in Prometheus' text format."""
        ...

    def repository_index(self, *, ready: bool = False) -> list[dict[str, Any]]:
        """`name`, `version`, `state` and `reason` of every known model version."""
        ...

    async def repository_load(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Open (or reload) a model and wait for it. Raises Unsupported where model control is off."""
        ...

    async def repository_unload(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Drain and close a model. Raises Unsupported where model control is off."""
        ...
