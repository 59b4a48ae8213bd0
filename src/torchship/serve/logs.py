"""The server's log: lines for readers, or JSON lines for machines, with model, stage, worker and request in fields."""

from __future__ import annotations

import logging
import re
import sys
import time
from typing import Any

import msgspec

from torchship.serve.config import Logs

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # a caller's id must not look like a line of the log
_LONGEST = 4000
_FIELDS = ("model", "version", "station", "pid", "request", "trace")


class _Json:
    """Formats a record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage()[:_LONGEST],
        }
        line |= {name: getattr(record, name) for name in _FIELDS if hasattr(record, name)}
        if record.exc_info:
            line["exception"] = logging.Formatter().formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


class _Text:
    """Formats a record for readers: time, level, where it comes from, message."""

    def format(self, record: logging.LogRecord) -> str:
        place = getattr(record, "station", "")
        place = f"[{place} {record.pid}] " if place and hasattr(record, "pid") else ""
        text = f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {record.levelname.lower():7} {place}"
        text += _CONTROL.sub(lambda found: repr(found[0])[1:-1], record.getMessage()[:_LONGEST])
        if record.exc_info:
            text += "\n" + logging.Formatter().formatException(record.exc_info)
        return text


def begin(logs: Logs) -> None:
    """Send the log to stderr in the wished form; may be called again to change it."""
    out = logging.StreamHandler(sys.stderr)
    out.setFormatter(_Json() if logs.format == "json" else _Text())  # type: ignore[arg-type]
    root = logging.getLogger("torchship")
    root.handlers[:] = [out]
    root.setLevel(logs.level.upper())
    root.propagate = False
