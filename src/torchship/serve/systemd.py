"""Tells systemd how the server is: ready, alive, reloading, stopping, by datagrams to the socket that it gave.

Source: systemd, sd_notify(3) and sd_watchdog_enabled(3).
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, MutableMapping

_log = logging.getLogger("torchship.serve")
_SEND_S = 1.0  # seconds that a datagram may wait for room
_STATUS_S = 5.0  # seconds between two looks where no watchdog asks for more
_AGAIN = 5  # looks in half a watchdog's time while something hangs


class ServiceSupervisor:
    """The service manager that started this process, where one did and asked to be told (Type=notify)."""

    def __init__(self, environment: MutableMapping[str, str] = os.environ) -> None:
        """Takes what concerns this process out of the environment, so that its children do not speak in its name."""
        address = environment.pop("NOTIFY_SOCKET", "")
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        if address and address[0] not in "/@":
            _log.warning(
                "NOTIFY_SOCKET is %s: only Unix sockets are spoken to, the service manager is told nothing", address
            )
            self._address = ""
        usec, pid = environment.pop("WATCHDOG_USEC", ""), environment.pop("WATCHDOG_PID", "")
        ours = usec.isdecimal() and pid in ("", str(os.getpid()))
        self._half = int(usec) / 2e6 if ours else 0.0  # seconds
        self._status = ""

    @property
    def there(self) -> bool:
        """Whether somebody listens."""
        return bool(self._address)

    def tell(self, *lines: str) -> None:
        """Send assignments such as READY=1 in one datagram. What cannot be sent is logged: nobody can be asked."""
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(_SEND_S)
            try:
                sock.sendto("\n".join(lines).encode(), self._address)
            except OSError as fault:
                _log.warning("the service manager cannot be told %s: %s", lines[0], fault.strerror or fault)

    def reloading(self) -> None:
        """What follows is a reload, until `tell("READY=1")`."""
        self.tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    async def attend(self, look: Callable[[], tuple[str, str]]) -> None:
        """Give a sign of life each half of the watchdog's time, as long as nothing hangs. Runs until it is cancelled.

        `look` gives what hangs, empty while nothing does, and the status in words. It is called on the event loop: a
        loop that does not turn gives no sign.
        """
        hung = ""
        while self._address:
            before, (hung, status) = hung, look()
            lines = [] if hung or not self._half else ["WATCHDOG=1"]
            if (status := f"STATUS={hung or status}".replace("\n", " ")) != self._status:
                self._status = status
                lines.append(status)
            if lines:
                self.tell(*lines)
            if hung and hung != before:
                _log.error("%s%s", hung, ": the watchdog is not fed" if self._half else "")
            await asyncio.sleep((self._half or _STATUS_S) / (_AGAIN if hung else 1))
