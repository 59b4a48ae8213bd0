"""What a worker prints: read without ever holding up the host, passed on line by line, and only so many a second."""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress

_PIPE = 2**18  # bytes that a worker can print before it has to wait for us
_PAUSE = 0.01  # seconds between two looks
_RATE = 200  # lines a second, once the burst is used up
_BURST = 1000
_LINE = 2000  # characters
_THREAD = re.compile(rb"block: \[[\d,]+\], thread: \[[\d,]+\] ")  # in CUDA's line for each thread that asserts
_ADVICE = (b"CUDA kernel errors might be", b"For debugging consider", b"Compile with `TORCH_USE_CUDA_DSA`",
           b"Search for `cudaError")  # fmt: skip
_TAIL = 2**14  # bytes that are kept for whoever asks for the last lines


class WorkerOutput:
    """The pipe that holds a worker's stdout and stderr. `on_line` gets each line; what is too much is counted, and so
    are the threads of a card that fail one assertion."""

    def __init__(self, *, loop: asyncio.AbstractEventLoop, on_line: Callable[[str], None]) -> None:
        """`inlet` is the worker's end, to be closed when the worker has it. Raises OSError."""
        self._fd, self.inlet = os.pipe()
        self._loop = loop
        self._on_line = on_line
        self._rest = b""
        self._tail = b""
        self._credit = float(_BURST)
        self._at = time.monotonic()
        self._dropped = 0
        self._asserted = b""
        self._repeated = 0
        self._pause: asyncio.TimerHandle | None = None
        os.set_blocking(self._fd, False)
        with suppress(OSError):  # this user has too many large ones: the usual size does too
            fcntl.fcntl(self._fd, fcntl.F_SETPIPE_SZ, _PIPE)
        loop.add_reader(self._fd, self._read)

    @property
    def tail(self) -> str:
        """The last 16 KiB."""
        return self._tail.decode(errors="replace")

    @property
    def last_lines(self) -> list[str]:
        """The last five lines; of an assertion on a card only the first thread's, and not CUDA's general advice."""
        told: dict[bytes, str] = {}
        for number, line in enumerate(self._tail.split(b"\n")):
            if line.strip() and not line.startswith(_ADVICE):
                told.setdefault(_asserted(line) or b"%d" % number, line[:_LINE].decode(errors="replace").rstrip())
        return list(told.values())[-5:]

    def _read(self) -> None:
        """Take what is there, then pause: a worker that prints without end costs one look in a while."""
        self._loop.remove_reader(self._fd)
        if self._take():
            self._pause = self._loop.call_later(_PAUSE, self._loop.add_reader, self._fd, self._read)

    def _take(self) -> bool:
        """Pass on what has been printed; False at the end of the pipe."""
        try:
            data = os.read(self._fd, _PIPE)
        except BlockingIOError:
            return True
        self._tail = (self._tail + data)[-_TAIL:]
        now = time.monotonic()
        self._credit = min(_BURST, self._credit + (now - self._at) * _RATE)
        self._at = now
        if self._dropped and self._credit >= 1:
            self._on_line(f"({self._dropped} lines were printed too fast and are not shown)")
            self._dropped = 0
        *lines, self._rest = (self._rest + data).split(b"\n", max(0, int(self._credit)))
        if self._rest.count(b"\n"):
            self._dropped += self._rest.count(b"\n")
            self._rest = self._rest[self._rest.rindex(b"\n") + 1 :]
        if self._rest and (len(self._rest) > _LINE or not data):
            lines, self._rest = [*lines, self._rest], b""
        self._dropped += max(0, len(lines) - int(self._credit) - 1)
        self._credit -= len(lines)
        for line in lines:
            self._tell(line)
        return bool(data)

    def _tell(self, line: bytes) -> None:
        """Pass a line on, unless it is one more thread's of an assertion that was told."""
        asserted = _asserted(line)
        if asserted and asserted == self._asserted:
            self._repeated += 1
            return
        self._tell_repeated()
        self._asserted = asserted
        self._on_line(line[:_LINE].decode(errors="replace").rstrip())

    def _tell_repeated(self) -> None:
        if self._repeated:
            self._on_line(f"(the same of {self._repeated} more threads)")
        self._asserted, self._repeated = b"", 0

    def close(self) -> None:
        """Pass on what is left, and close the pipe."""
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._fd)
        for _ in range(8):
            before = self._tail
            if not self._take() or self._tail is before:
                break
        self._tell_repeated()
        os.close(self._fd)


def _asserted(line: bytes) -> bytes:
    """What fails on a card, without the thread that says it; empty for any other line."""
    return _THREAD.sub(b"", line) if _THREAD.search(line) else b""
