"""The server's log: lines for readers, or JSON lines for machines, with model, stage, worker and request in fields."""

from __future__ import annotations

import contextlib
import logging
import queue
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TextIO

import msgspec

from torchship.serve.config import Logs

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # a caller's id must not look like a line of the log
_LONGEST = 4000
_QUEUED = 5000  # lines
_FIELDS = ("model", "version", "station", "pid", "request", "trace")


def _json(record: logging.LogRecord) -> str:
    """A record as one line of JSON."""
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


def _text(record: logging.LogRecord) -> str:
    """A record for readers: time, level, where it comes from, message."""
    place = getattr(record, "station", "")
    place = f"[{place} {record.pid}] " if place and hasattr(record, "pid") else ""
    text = f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {record.levelname.lower():7} {place}"
    text += _CONTROL.sub(lambda found: repr(found[0])[1:-1], record.getMessage()[:_LONGEST])
    if record.exc_info:
        text += "\n" + logging.Formatter().formatException(record.exc_info)
    return text


class _Writer(logging.Handler):
    """Writes from a thread of its own: where nobody reads stderr, lines are dropped and counted, and nobody waits."""

    def __init__(self, stream: TextIO, form: Callable[[logging.LogRecord], str]) -> None:
        super().__init__()
        self._stream, self._form = stream, form
        self._lines: queue.Queue[str | None] = queue.Queue(_QUEUED)
        self._dropped = 0
        threading.Thread(target=self._write, name="torchship-log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(self._form(record))
        except queue.Full:
            self._dropped += 1
        except Exception:
            self.handleError(record)

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            if self._dropped and self._lines.empty():
                dropped, self._dropped = self._dropped, 0
                text = f"{dropped} lines of the log were dropped: they were not read fast enough"
                line += "\n" + self._form(logging.LogRecord("torchship", logging.WARNING, "", 0, text, None, None))
            with contextlib.suppress(OSError, ValueError):  # closed: there is nobody to tell
                self._stream.write(f"{line}\n")
                self._stream.flush()
            self._lines.task_done()

    def flush(self) -> None:
        """Wait until all is written, for at most a second."""
        end = time.monotonic() + 1.0
        while self._lines.unfinished_tasks and time.monotonic() < end:
            time.sleep(0.005)

    def close(self) -> None:
        super().close()
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(None)


def begin(logs: Logs) -> None:
    """Send the log to stderr in the wished form; may be called again to change it."""
    out = _Writer(sys.stderr, _json if logs.format == "json" else _text)
    root = logging.getLogger("torchship")
    for old in root.handlers:
        old.close()
    root.handlers[:] = [out]
    root.setLevel(logs.level.upper())
    root.propagate = False
