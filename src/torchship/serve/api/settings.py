"""Trace and log settings as Triton's extensions have them; both can be read and changed while the server runs."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from time import time_ns
from typing import Any

from torchship.errors import BadInput, Unsupported
from torchship.serve.service import Answer
from torchship.wire.messages import Request, Response

_FILE = re.compile(r"[A-Za-z0-9_][\w.\-]{0,100}", re.ASCII)
_NUMBER = re.compile(r"-?[0-9]{1,12}")
_TRACE = {
    "trace_file": [""],
    "trace_level": ["OFF"],
    "trace_rate": ["1000"],
    "trace_count": ["-1"],
    "log_frequency": ["0"],
}
Settings = dict[str, list[str]]
_KNOWN = 1024


class Tracing:
    """Samples requests and writes their timestamps as JSON lines into a file of a folder that the server chose."""

    def __init__(self, *, folder: Path | None = None) -> None:
        """Without a folder nothing can be traced: then the level can only be OFF."""
        self._folder = folder
        self._all: Settings = {name: list(value) for name, value in _TRACE.items()}
        self._models: dict[str, Settings] = {}
        self._seen: dict[str, int] = {}
        self._written: dict[str, int] = {}
        self.active = False

    def settings(self, model: str = "") -> dict[str, Any]:
        """The settings of a model, or of all: level is a list, the others are strings."""
        found = {**self._all, **self._models.get(model, {})}
        return {name: value if name == "trace_level" else value[0] for name, value in found.items()}

    def change(self, changes: Mapping[str, Any], model: str = "") -> dict[str, Any]:
        """Set some; a null clears one of a model, or resets it for all. Raises BadInput, Unsupported."""
        accepted = {name: self._checked(name, value) for name, value in changes.items()}
        for name, value in accepted.items():
            if model:
                mine = self._models.setdefault(model, {})
                if value is None:
                    mine.pop(name, None)
                else:
                    mine[name] = value
            else:
                self._all[name] = list(_TRACE[name]) if value is None else value
        levels = [self._all["trace_level"], *(mine.get("trace_level", ["OFF"]) for mine in self._models.values())]
        self.active = any(level != ["OFF"] for level in levels)
        if "trace_count" in accepted:
            self._written.clear()
        return self.settings(model)

    def _checked(self, name: str, value: Any) -> list[str] | None:
        if name not in _TRACE:
            raise BadInput(f"unknown trace setting {name[:60]!r}", hint=f"they are {', '.join(_TRACE)}")
        if value is None or value == []:
            return None
        items = [str(item) for item in value] if isinstance(value, list) else [str(value)]
        if name == "trace_level":
            if any(item not in ("OFF", "TIMESTAMPS", "TENSORS") for item in items):
                raise BadInput(f"trace_level is {items}, expected OFF, TIMESTAMPS or TENSORS")
            if items != ["OFF"] and self._folder is None:
                raise Unsupported("this server does not trace", hint="give it a folder for traces in its configuration")
        elif len(items) != 1:
            raise BadInput(f"{name} has {len(items)} values, expected one")
        elif name == "trace_file":
            if items[0] and not _FILE.fullmatch(items[0]):
                raise BadInput("trace_file is a plain file name; the server chooses the folder")
        elif not _NUMBER.fullmatch(items[0]):
            raise BadInput(f"{name} is {items[0][:40]!r}, expected an integer")
        return items

    def around(self, answer: Answer, request: Request) -> Answer:
        """The way an answer goes, by the trace if this request gets one."""
        start = self.sample(request)
        if not start:
            return answer

        def traced(whom: Any, request: Request, end: Response | Exception) -> None:
            self.record(request, start=start)
            answer(whom, request, end)

        return traced

    def sample(self, request: Request) -> int:
        """The start in nanoseconds when this request is to be traced, else 0."""
        found = {**self._all, **self._models.get(request.model, {})}
        if found["trace_level"] == ["OFF"]:
            return 0
        if len(self._seen) > _KNOWN:  # by names that nobody has checked yet
            self._seen.clear()
        seen = self._seen[request.model] = self._seen.get(request.model, 0) + 1
        count = int(found["trace_count"][0])
        if seen % max(1, int(found["trace_rate"][0])) or 0 <= count <= self._written.get(request.model, 0):
            return 0
        return time_ns()

    def record(self, request: Request, *, start: int, error: str = "") -> None:
        """Write one trace: two timestamps, and names and shapes of the tensors at level TENSORS."""
        if self._folder is None:
            return
        found = {**self._all, **self._models.get(request.model, {})}
        stamps = [{"name": "REQUEST_START", "ns": start}, {"name": "REQUEST_END", "ns": time_ns()}]
        line: dict[str, Any] = {"model_name": request.model, "request_id": request.id, "timestamps": stamps}
        if "TENSORS" in found["trace_level"]:
            line["inputs"] = {name: list(array.shape) for name, array in request.inputs.items()}
        if error:
            line["error"] = error
        self._written[request.model] = self._written.get(request.model, 0) + 1
        with (self._folder / (found["trace_file"][0] or "trace.jsonl")).open("a") as file:
            file.write(json.dumps(line) + "\n")


class LogSettings:
    """How much the server logs."""

    def __init__(self, *, logger: str = "torchship") -> None:
        self._logger = logging.getLogger(logger)
        self._values: dict[str, Any] = {
            "log_file": "",
            "log_info": True,
            "log_warning": True,
            "log_error": True,
            "log_verbose_level": 0,
            "log_format": "default",
        }

    def settings(self) -> dict[str, Any]:
        """All settings."""
        return dict(self._values)

    def change(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Set some. Raises BadInput for an unknown one or a wrong value, Unsupported for what cannot be changed."""
        for name, value in changes.items():
            if name not in self._values:
                raise BadInput(f"unknown log setting {name[:60]!r}", hint=f"they are {', '.join(self._values)}")
            if type(value) is not type(self._values[name]) or (type(value) is int and not 0 <= value <= 9):
                raise BadInput(f"{name} is {value!r:.60}, expected as in {self._values[name]!r}")
            if name in ("log_file", "log_format") and value != self._values[name]:
                raise Unsupported(f"{name} cannot be changed from outside", hint="set it in the configuration")
        self._values.update(changes)
        if changes:
            self._logger.setLevel(self._level())
        return self.settings()

    def _level(self) -> int:
        if self._values["log_verbose_level"]:
            return logging.DEBUG
        for name, level in (("log_info", logging.INFO), ("log_warning", logging.WARNING), ("log_error", logging.ERROR)):
            if self._values[name]:
                return level
        return logging.CRITICAL
