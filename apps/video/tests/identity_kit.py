"""For tests of identities: somebody's embeddings, frames and observations without pixels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from torchship_video.identity.assignment import Rule
from torchship_video.identity.identities import Bounds, Identities
from torchship_video.messages import Frame, Observation, Track

WIDTH = 32
RULE = Rule(threshold=0.8, margin=0.03, travel=0.06)
BOUNDS = Bounds(least=1, ripe=0.0)


def looks(person: int, *, turn: int = 0) -> NDArray[np.float32]:
    """An embedding of a person: those of one are alike (cosine above 0.95), those of two are not (below 0.6)."""
    base = np.random.default_rng(person).standard_normal(WIDTH)
    noise = np.random.default_rng([person, turn, 7]).standard_normal(WIDTH)
    return (base / np.linalg.norm(base) + 0.15 * noise / np.linalg.norm(noise)).astype(np.float32)


def gallery(root: object = None, *, bounds: Bounds = BOUNDS, rule: Rule = RULE) -> Identities:
    """An empty gallery, or that of a folder."""
    return Identities(root, embedder="test", width=WIDTH, rule=rule, bounds=bounds)  # type: ignore[arg-type]


def observation(camera: str, tracks: list[int], time: float) -> Observation:
    """A frame on which these tracks stand side by side."""
    frame = Frame(camera, "torchship-ring-none", 0, 2, 0, time, time, 640, 480, "RGB")
    boxes = [(40.0 * n, 100.0, 40.0 * n + 30, 200.0) for n in range(len(tracks))]
    found = (Track(number, box, 0.9, "person", True) for number, box in zip(tracks, boxes, strict=True))
    return Observation(frame, tuple(found))


def see(identities: Identities, camera: str, track: int, person: int, *times: float, crop: bytes = b"") -> int:
    """A person is a track on a camera at these times; the identity after the last of them is decided."""
    for time in times:
        identities.update(camera, track, looks(person, turn=int(time * 10)), 0.8, time, crop=crop)
    identities.decide()
    seen = identities.observe(observation(camera, [track], times[-1])).tracks
    return seen[0].identity
