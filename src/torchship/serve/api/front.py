"""What all protocols of one server share beside the service: clients' shared memory, trace and log settings."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torchship.errors import BadConfig, Denied, Unsupported
from torchship.serve.api.regions import SharedMemory, SharedRegion
from torchship.serve.api.settings import LogSettings, Tracing
from torchship.serve.engine.queue import Job
from torchship.serve.http.exchange import Head
from torchship.serve.service import Answer, Service
from torchship.wire.messages import Request


@dataclass(slots=True)
class Front:
    """One for a server; every listener gets the same. Its methods take and give plain data for REST and gRPC alike.

    `forward` is a regular expression: headers whose whole name matches, in capitals or not, travel with a request.
    `drain` ends the server's service. `scheme` and `guarded` (a token is asked for) are told in the examples of /docs.
    """

    service: Service
    regions: SharedMemory | None = None
    tracing: Tracing = field(default_factory=Tracing)
    logs: LogSettings = field(default_factory=LogSettings)
    forward: str = ""
    scheme: str = "http"
    guarded: bool = False
    drain: Callable[[], Awaitable[None]] | None = None
    memory: SharedMemory = field(init=False)  # what clients see: nothing is ever registered where `regions` is None

    def __post_init__(self) -> None:
        """Raises BadConfig for what is no regular expression."""
        self.memory = self.regions or SharedMemory()
        try:
            re.compile(self.forward)
        except re.error as fault:
            raise BadConfig(f"forward_headers: {fault}", hint="a regular expression, as in x-.*|traceparent") from None

    def forwarded(self, head: Head) -> dict[str, str]:
        """The headers of a request that travel with it."""
        if not self.forward:
            return {}
        return {name: value for name, value in head.headers.items() if re.fullmatch(self.forward, name, re.IGNORECASE)}

    def start(self, request: Request, answer: Answer, whom: Any) -> Job:
        """Begin an inference as Service.start does: traced if it should be, and with a hold on its shared memory."""
        if self.tracing.active:
            answer = self.tracing.around(answer, request)
        if self.regions is None or not request.outputs:
            return self.service.start(request, answer, whom)
        held = self.regions.hold(request)
        try:
            return self.service.start(request, partial(_answered, held, answer), whom)
        except BaseException:
            SharedMemory.release(held)
            raise

    @staticmethod
    def attach(request: Request, headers: Mapping[str, str]) -> None:
        """Let headers travel with a request; a stage sees them as parameters, `x-tenant` as `x_tenant`."""
        request.headers = dict(headers)
        request.parameters = {
            **{name.replace("-", "_"): value for name, value in headers.items()},
            **request.parameters,
        }

    # What follows looks after the server: a token with the scope manage may do it.

    def register(self, name: str, *, key: str, offset: int, size: int) -> None:
        """Register system shared memory. Raises Unsupported where it is off, BadInput for what cannot be had."""
        if self.regions is None:
            raise Unsupported("shared memory is off", hint="set shared_memory = true in [control]")
        self.regions.register(name, key=key, offset=offset, size=size)

    def trace(self, changes: Mapping[str, Any], model: str = "") -> dict[str, Any]:
        """Change trace settings, of one model or of all; as they are then. Raises NotFound for an unknown model."""
        if model:
            self.service.model_metadata(model)
        return self.tracing.change(changes, model)

    async def finish(self) -> None:
        """Answer what was begun and take nothing more; done when that is so, even if the caller has left.

        Raises Denied where no token is asked for: then every page in a browser of this machine could do it.
        """
        if self.drain is None or not self.guarded:
            raise Denied("only a token with the scope manage may do this", hint="add a [[token]] to the configuration")
        await asyncio.shield(asyncio.ensure_future(self.drain()))


def _answered(held: list[SharedRegion], answer: Answer, whom: Any, request: Request, end: Any) -> None:
    answer(whom, request, end)
    SharedMemory.release(held)
