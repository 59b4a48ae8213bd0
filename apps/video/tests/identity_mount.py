"""For tests: a mount with two cameras on which a red and a blue figure walk, recognized by the served line."""

from __future__ import annotations

import asyncio
import time

from torchship.serve.routes import Mounted, Service
from torchship_video import appearance, ring
from torchship_video.identity.evidence import EvidenceBook
from torchship_video.identity.identities import Identities
from torchship_video.identity.identity_routes import routes
from torchship_video.identity.recognition import Recognition
from torchship_video.messages import Observation, Track

WIDTH, HEIGHT = 320, 240
COLOURS = {1: (200, 20, 30), 2: (20, 40, 190)}


def mount(service: Service, *, gallery: str, walk: bool = True) -> Mounted:
    """Both figures cross the camera `door`, and half a second later the camera `yard`."""
    identities = Identities(
        gallery, embedder=appearance.HISTOGRAM, width=appearance.HISTOGRAM_WIDTH, rule=appearance.HISTOGRAM_RULE
    )
    recognition = Recognition(service, identities, flush_s=0.2)
    assert EvidenceBook(identities).crop(10**6, 0) is None

    async def run() -> None:
        saving = asyncio.create_task(recognition.run())
        try:
            start = time.time()
            for camera in ("door", "yard") if walk else ():
                await _walk(camera, recognition, start)
                start += 20.0
            await saving
        finally:
            saving.cancel()
            await asyncio.gather(saving, return_exceptions=True)

    return Mounted(routes(identities), run)


async def _walk(camera: str, recognition: Recognition, start: float) -> None:
    writer = ring.RingWriter.make(size=WIDTH * HEIGHT * 3, slots=8)
    try:
        for step in range(12):
            slot = writer.claim()
            assert slot is not None
            pixels = slot.pixels(WIDTH, HEIGHT, "RGB")
            pixels[:] = 128
            tracks = []
            for number, colour in COLOURS.items():
                left = 20 + 8 * step + 140 * (number - 1)
                pixels[40:200, left : left + 60] = colour
                tracks.append(Track(number, (left, 40.0, left + 60.0, 200.0), 0.9, "person", True))
            moment = start + 0.4 * step
            frame = slot.publish(camera, sequence=step, taken=moment)
            recognition.observe(Observation(frame, tuple(tracks)))
            await asyncio.sleep(0.05)
        await recognition.settle()
    finally:
        writer.close()
