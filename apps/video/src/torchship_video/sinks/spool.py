"""A spool: deliveries in a folder, a file each, sent in order by a thread until they are taken; bounded, crash-safe."""

from __future__ import annotations

import fcntl
import logging
import os
import random
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from torchship.errors import BadConfig

_log = logging.getLogger("torchship.video")
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds between two tries
_CLOSING = 3.0  # seconds for what waits when the spool is closed


class Attempt(NamedTuple):
    """What became of a try: delivered, refused for good, or to be tried again (after `wait` seconds, if asked for)."""

    what: Literal["delivered", "refused", "again"]
    words: str = ""
    wait: float = 0.0


Send: TypeAlias = Callable[[str, bytes], Attempt]


class Spool:
    """`put` writes to the disk and returns; a thread sends the oldest first. One process has a folder at a time."""

    def __init__(self, folder: Path, send: Send, *, limit: int) -> None:
        """`send(name, body)` makes one try and may raise OSError. The folder holds `limit` bytes at most.

        Raises BadConfig when another process has the folder.
        """
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder, self._send, self._limit = folder, send, limit
        self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise BadConfig(f"another sink uses the spool {folder}", hint="give each its own spool") from None
        for torn in folder.glob("*.tmp"):
            torn.unlink()
        self._waiting = {path.name: path.stat().st_size for path in sorted(folder.glob("*.json"))}
        self._counts = dict.fromkeys(("delivered", "refused", "spool_dropped", "tries"), 0)
        self._change = threading.Condition()
        self._until = float("inf")
        self._thread = threading.Thread(target=self._deliver, name="spool", daemon=True)
        self._thread.start()

    def put(self, body: bytes) -> None:
        """Keep one delivery. It is on the disk when this returns; the oldest ones go where there is no room.

        Raises OSError when the disk cannot take it.
        """
        name = f"{time.time_ns():020d}-{secrets.token_hex(4)}.json"
        made = self._folder / f"{name}.tmp"
        with made.open("wb") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        with self._change:
            made.rename(self._folder / name)
            self._waiting[name] = len(body)
            while sum(self._waiting.values()) > self._limit and len(self._waiting) > 1:
                self._remove(next(iter(self._waiting)), "spool_dropped")
            self._change.notify()

    def counts(self) -> dict[str, int]:
        """How many were delivered, refused by the receiver, dropped for room, tried, and how many wait."""
        with self._change:
            return self._counts | {"spooled": len(self._waiting)}

    def close(self) -> None:
        """Try for a few seconds to send what waits; what is left stays for the next start."""
        with self._change:
            self._until = time.monotonic() + _CLOSING
            self._change.notify()
        self._thread.join(_CLOSING + 1.0)
        os.close(self._lock)

    def _deliver(self) -> None:
        pause = FIRST_PAUSE
        while True:
            with self._change:
                while not self._waiting:
                    if self._until < float("inf"):
                        return
                    self._change.wait()
                name = next(iter(self._waiting))
            attempt = self._try(name)
            if attempt.what == "again":
                wait = max(min(attempt.wait, LONGEST_PAUSE), pause * random.uniform(0.5, 1.0))  # noqa: S311
                _log.warning("%s: %s; again in %.1f s", self._folder.name, attempt.words, wait)
                pause = min(pause * 2, LONGEST_PAUSE)
                with self._change:
                    self._change.wait_for(lambda: self._until < float("inf"), wait)
                    if self._until < float("inf") and time.monotonic() + FIRST_PAUSE > self._until:
                        return
                    if self._until < float("inf"):
                        self._change.wait(FIRST_PAUSE)
                continue
            pause = FIRST_PAUSE
            if attempt.what == "refused":
                _log.error("%s: delivery %s is given up: %s", self._folder.name, name, attempt.words)
            with self._change:
                self._remove(name, attempt.what)

    def _try(self, name: str) -> Attempt:
        with self._change:
            self._counts["tries"] += 1
        try:
            body = (self._folder / name).read_bytes()
        except FileNotFoundError:  # dropped meanwhile
            return Attempt("refused", "it is no longer in the spool")
        try:
            return self._send(name.removesuffix(".json"), body)
        except OSError as fault:
            return Attempt("again", f"{type(fault).__name__}: {fault}")

    def _remove(self, name: str, counted: str) -> None:
        """Forget a delivery and count why, unless it is gone already."""
        if self._waiting.pop(name, None) is not None:
            self._counts[counted] += 1
            with suppress(FileNotFoundError):
                (self._folder / name).unlink()
