"""Trace and log settings as Triton's extensions have them; both can be read and changed while the server runs."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from time import time_ns
from typing import Any

import msgspec

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
_LEVELS = (  # the first one that is on; at last none is
    ("log_verbose_level", logging.DEBUG),
    ("log_info", logging.INFO),
    ("log_warning", logging.WARNING),
    ("log_error", logging.ERROR),
    ("", logging.CRITICAL),
)
Settings = dict[str, list[str]]
_KNOWN = 1024


class Tracing:
    """Samples requests and writes their timestamps as JSON lines into a file of a folder that the server chose."""

    def __init__(self, *, folder: Path | None = None) -> None:
        """Without a folder nothing can be traced: then the level can only be OFF."""
        self._folder = folder
        self._set: dict[str, Settings] = {}  # what was changed, by model; "" holds for all of them
        self._seen: dict[str, int] = {}
        self._written: dict[str, int] = {}
        self.active = False

    def change(self, changes: Mapping[str, Any], model: str = "") -> dict[str, Any]:
        """Set some, of a model or of all; a null resets one. All of them as they are then: the level is a list, the
        others are strings. Raises BadInput, Unsupported."""
        accepted = {name: self._checked(name, value) for name, value in changes.items()}
        mine = self._set.setdefault(model, {})
        for name, value in accepted.items():
            mine.pop(name, None)
            if value is not None:
                mine[name] = value
        self.active = any(one.get("trace_level", ["OFF"]) != ["OFF"] for one in self._set.values())
        if "trace_count" in accepted:
            self._written.clear()
        return {name: value if name == "trace_level" else value[0] for name, value in self._of(model).items()}

    def _of(self, model: str) -> Settings:
        return {**_TRACE, **self._set.get("", {}), **self._set.get(model, {})}

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
        """The way an answer goes: by the trace, with two timestamps, if this request gets one."""
        found = self._of(request.model)
        if found["trace_level"] == ["OFF"] or self._folder is None:
            return answer
        if len(self._seen) > _KNOWN:  # by names that nobody has checked yet
            self._seen.clear()
        seen = self._seen[request.model] = self._seen.get(request.model, 0) + 1
        count = int(found["trace_count"][0])
        if seen % max(1, int(found["trace_rate"][0])) or 0 <= count <= self._written.get(request.model, 0):
            return answer
        start, file = time_ns(), self._folder / (found["trace_file"][0] or "trace.jsonl")

        def traced(whom: Any, request: Request, end: Response | Exception) -> None:
            stamps = [{"name": "REQUEST_START", "ns": start}, {"name": "REQUEST_END", "ns": time_ns()}]
            line: dict[str, Any] = {"model_name": request.model, "request_id": request.id, "timestamps": stamps}
            if "TENSORS" in found["trace_level"]:
                line["inputs"] = {name: list(array.shape) for name, array in request.inputs.items()}
            self._written[request.model] = self._written.get(request.model, 0) + 1
            with file.open("ab") as out:
                out.write(msgspec.json.encode(line) + b"\n")
            answer(whom, request, end)

        return traced


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
            self._logger.setLevel(next(level for name, level in _LEVELS if self._values.get(name, True)))
        return dict(self._values)
