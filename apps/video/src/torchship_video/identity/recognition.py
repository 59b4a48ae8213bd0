"""Between the flow and the identities: chooses crops, has the line embed them, names tracks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import numpy as np

from torchship.errors import TorchshipError
from torchship.serve.routes import Service
from torchship_video import ring
from torchship_video.identity.identities import Identities
from torchship_video.identity.selection import CropChoice
from torchship_video.messages import Observation, Track, encode

_log = logging.getLogger(__name__)


class Recognition:
    """Give `observe` every observation before others see it, and run `run` beside; a slow embedder delays nothing.

    At most `pending` frames wait for their embeddings; while there are as many, no further crops are taken. Frames are
    held in the ring until they are embedded.
    """

    def __init__(
        self,
        service: Service,
        identities: Identities,
        *,
        line: str = "appearance",
        pending: int = 4,
        flush_s: float = 2.0,
        choice: CropChoice | None = None,
    ) -> None:
        self._service, self._identities, self._line = service, identities, line
        self._pending, self._flush_s = pending, flush_s
        self._choice = choice or CropChoice()
        self._tasks: set[asyncio.Task[None]] = set()
        self.embedded = self.skipped = self.failed = 0
        self.fault = ""

    def observe(self, observation: Observation, *, time: float | None = None) -> Observation:
        """The observation with identities; its best crops go to the embedder. Call it in the event loop."""
        moment = observation.frame.taken if time is None else time
        known = self._identities.observe(observation, time=moment)
        if len(self._tasks) >= self._pending:
            self.skipped += 1
            return known
        wanted = self._choice.choose(observation, time=moment)
        if wanted:
            try:
                ring.hold(observation.frame)
            except ring.StaleFrame:
                self.skipped += 1
                return known
            task = asyncio.get_running_loop().create_task(self._embed(observation, wanted, moment))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return known

    def restarted(self, camera: str) -> None:
        """The tracker of a camera began anew."""
        self._choice.restarted(camera)
        self._identities.restarted(camera)

    async def settle(self) -> None:
        """Wait until nothing is on its way, then decide what is undecided: at the end of recordings."""
        while self._tasks:
            await asyncio.wait(self._tasks)
        self._identities.decide()

    async def run(self) -> None:
        """Save the identities every `flush_s` seconds, and once more when this is cancelled."""
        try:
            while True:
                await asyncio.sleep(self._flush_s)
                try:
                    await asyncio.to_thread(self._identities.flush)
                except TorchshipError as fault:  # a full disk: the next turn tries again
                    _log.error("identities: %s", fault.line)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.shield(asyncio.to_thread(self._identities.close))

    async def _embed(self, observation: Observation, wanted: Sequence[tuple[Track, float]], time: float) -> None:
        frame = observation.frame
        handles = np.full((len(wanted), 1), encode(frame), np.object_)
        boxes = np.array([track.box for track, _ in wanted], np.float32)
        try:
            found = await self._service.infer(
                self._line, {"frame": handles, "box": boxes}, outputs=["embedding", "jpeg", "sharpness", "usable"]
            )
            for row, (track, quality) in enumerate(wanted):
                if found["usable"][row]:
                    weight = quality * (0.25 + 0.75 * float(found["sharpness"][row]))
                    jpeg = bytes(found["jpeg"][row, 0])
                    self._identities.update(
                        frame.camera, track.number, found["embedding"][row], weight, time, crop=jpeg
                    )
                    self.embedded += 1
        except TorchshipError as fault:
            self.failed += 1
            self.fault = fault.line
            _log.warning("appearance of tracks of %s: %s", frame.camera, fault.line)
        finally:
            ring.release(frame)
