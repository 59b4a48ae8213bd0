"""A visit is one track on one camera, with its best embeddings and crops; an identity is what visits are joined to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from torchship.errors import BadInput

Vector: TypeAlias = NDArray[np.float32]
KEPT_VECTORS = 6
KEPT_CROPS = 3


class KeptVector(msgspec.Struct, frozen=True, array_like=True):
    """One embedding of a visit: unit length, float16, little endian."""

    data: bytes
    quality: float


class KeptCrop(msgspec.Struct, frozen=True, array_like=True):
    """One picture of a visit as JPEG, and when it was taken."""

    jpeg: bytes
    quality: float
    time: float


class Visit(msgspec.Struct):
    """One track on one camera from `first` to `last`, in seconds of one clock for all cameras.

    `serial` is unique for the gallery and never used again. `identity` is 0 until it is decided, `past` what it was
    before each merge by hand: a split gives that back. `similarity` is how well it fitted when it was joined, 0 for the
    visit that an identity began with. `rivals` are the identities that fitted about equally well, best first.
    `by_hand`: somebody merged or split it, so it is not decided again.
    """

    serial: int
    camera: str
    track: int
    first: float
    last: float
    identity: int = 0
    past: list[int] = []
    similarity: float = 0.0
    ambiguous: bool = False
    by_hand: bool = False
    rivals: list[tuple[int, float]] = []
    vectors: list[KeptVector] = []
    crops: list[KeptCrop] = []

    @property
    def quality(self) -> float:
        """That of its best embedding."""
        return max((kept.quality for kept in self.vectors), default=0.0)

    def mean(self) -> Vector:
        """Its embeddings weighted by their quality, unit length."""
        rows = np.stack([np.frombuffer(kept.data, "<f2") for kept in self.vectors]).astype(np.float32)
        weights = np.array([max(kept.quality, 1e-6) for kept in self.vectors], np.float32)
        whole: Vector = weights @ rows
        return whole / max(float(np.linalg.norm(whole)), 1e-12)

    def add(self, vector: Vector, *, quality: float, crop: bytes, time: float) -> bool:
        """Keep the embedding and the crop if they are among the best; whether anything changed."""
        vectors = _best([*self.vectors, KeptVector(vector.astype("<f2").tobytes(), quality)], KEPT_VECTORS)
        crops = _best([*self.crops, KeptCrop(crop, quality, time)], KEPT_CROPS) if crop else self.crops
        changed = vectors != self.vectors or crops != self.crops
        self.vectors, self.crops = vectors, crops
        return changed

    def meets(self, other: Visit) -> bool:
        """Whether both were on one camera at one time: then they are never one identity."""
        return self.camera == other.camera and self.first <= other.last and other.first <= self.last


def _best(kept: list[KeptVector] | list[KeptCrop], count: int) -> list:  # type: ignore[type-arg]
    return sorted(kept, key=lambda one: -one.quality)[:count]


def unit(embedding: Iterable[float], *, width: int) -> Vector:
    """The embedding with length 1. Raises BadInput unless it is finite, not zero, and `width` long."""
    vector = np.asarray(embedding, np.float32).reshape(-1)
    length = float(np.linalg.norm(vector))
    if len(vector) != width or not np.isfinite(length) or length < 1e-12:
        raise BadInput(
            f"an embedding of {len(vector)} numbers and length {length:.3g}, expected {width} and more than 0",
            hint="the gallery belongs to one embedder",
        )
    return vector / length
