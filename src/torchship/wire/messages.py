"""Request and Response: what every protocol decodes into and encodes from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torchship.stage import Value
from torchship.tensors import Tensors


@dataclass(slots=True)
class WantedOutput:
    """One output that the caller names: `binary` is its encoding, `classification` asks for the top k classes."""

    name: str
    binary: bool = False
    classification: int = 0
    parameters: dict[str, Value] = field(default_factory=dict)


@dataclass(slots=True)
class Request:
    """One inference request. `deadline` counts from arrival in seconds (0: the model's own); an empty version means
    the current one; an empty `outputs` means all of them, in binary where `binary` says so."""

    model: str
    inputs: Tensors
    version: str = ""
    id: str = ""
    parameters: dict[str, Value] = field(default_factory=dict)
    outputs: tuple[WantedOutput, ...] = ()
    deadline: float = 0.0
    priority: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    binary: bool = False


@dataclass(slots=True)
class Response:
    """One answer to a Request."""

    model: str
    version: str
    outputs: Tensors
    id: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
