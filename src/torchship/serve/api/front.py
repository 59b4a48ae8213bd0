"""What all protocols of one server share beside the service: clients' shared memory, trace and log settings."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torchship.errors import BadConfig
from torchship.serve.api.regions import SharedMemory
from torchship.serve.api.settings import LogSettings, Tracing
from torchship.serve.engine.queue import Job
from torchship.serve.http.exchange import Head
from torchship.serve.service import Answer, Service
from torchship.wire.messages import Request, Response


@dataclass(slots=True)
class Front:
    """One for a server; every listener gets the same.

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

    def __post_init__(self) -> None:
        """Raises BadConfig for what is no regular expression."""
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
        regions, held = self.regions, self.regions.hold(request)

        def answered(whom: Any, request: Request, end: Response | Exception) -> None:
            answer(whom, request, end)
            regions.release(held)

        try:
            return self.service.start(request, answered, whom)
        except BaseException:
            regions.release(held)
            raise

    @staticmethod
    def attach(request: Request, headers: Mapping[str, str]) -> None:
        """Let headers travel with a request; a stage sees them as parameters, `x-tenant` as `x_tenant`."""
        request.headers = dict(headers)
        request.parameters = {
            **{name.replace("-", "_"): value for name, value in headers.items()},
            **request.parameters,
        }
