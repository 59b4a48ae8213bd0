"""The most memory that this server has held, all its processes together: for machines that have little."""

from __future__ import annotations

import asyncio
import logging
import os

from torchship import process

_log = logging.getLogger("torchship.serve")
_EVERY = 10.0  # seconds between two looks, each of which costs some milliseconds


class PeakMemory:
    """What is looked at is told in bytes; 0 before the first look. `expected` is what was measured for the models when
    they were made, 0 where that is not known."""

    def __init__(self) -> None:
        self.now = self.most = self.expected = 0
        self._warned = False

    async def watch(self) -> None:
        """Look again and again, beside the event loop. Runs until it is cancelled."""
        while True:
            self.now = await asyncio.to_thread(process.held, os.getpid())
            self.most = max(self.most, self.now)
            if self.expected and self.most > 1.1 * self.expected and not self._warned:
                self._warned = True
                words = f"{self.most / 1e6:.1f} MB are held, {self.expected / 1e6:.1f} MB were measured"
                _log.warning("memory: %s when the models were made", words)
            await asyncio.sleep(_EVERY)


peak = PeakMemory()  # of this process and its children, as the kernel's counters are
