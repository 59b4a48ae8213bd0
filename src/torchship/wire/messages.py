"""Request and Response: what every protocol decodes into and encodes from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from torchship.stage import Value
from torchship.tensors import Tensors


class WantedOutput(msgspec.Struct):
    """One output that the caller names: `binary` is its encoding, `classification` asks for the top k classes, which
    the server gives the names in `labels`."""

    name: str
    binary: bool = False
    classification: int = 0
    parameters: dict[str, Value] = {}
    labels: Sequence[str] = ()


class Request(msgspec.Struct):
    """One inference request. `deadline` counts from arrival in seconds (0: the model's own); an empty version means
    the current one; an empty `outputs` means all of them, in binary where `binary` says so."""

    model: str
    inputs: Tensors
    version: str = ""
    id: str = ""
    parameters: dict[str, Value] = {}
    outputs: tuple[WantedOutput, ...] = ()
    deadline: float = 0.0
    priority: int = 0
    headers: dict[str, str] = {}
    binary: bool = False


class Response(msgspec.Struct):
    """One answer to a Request. `trace` is the W3C traceparent of the span that it was made in, if there is one."""

    model: str
    version: str
    outputs: Tensors
    id: str = ""
    parameters: dict[str, Any] = {}
    trace: str = ""
