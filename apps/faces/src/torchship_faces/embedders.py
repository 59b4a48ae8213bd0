"""The embedders that are known: their weights, the geometry of their chips, and the name of their vector space."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torchship.errors import Denied, NotFound
from torchship_faces.gallery import snapshot
from torchship_faces.weights import WEIGHTS


@dataclass(frozen=True, kw_only=True)
class Embedder:
    """`width` numbers a vector of length 1; chips of `side` pixels with the face where `template` wants it.

    `artifact` is its name in the store, `threshold` a sensible cosine similarity to call two faces one.
    """

    name: str
    weights: str
    artifact: str
    width: int
    side: int
    template: Literal["arcface", "dlib"]
    geometry: str
    threshold: float

    @property
    def space(self) -> str:
        """Names the vectors' space: vectors of two spaces must never be compared. Precision does not change it."""
        return f"{self.name}-{WEIGHTS[self.weights].sha256[:16]}-{self.geometry}"


_KNOWN = (
    Embedder(
        name="fr_feature", weights="fr_feature", artifact="face-embedder", width=512,
        side=112, template="arcface", geometry="arcface112-bgr", threshold=0.45,
    ),
    # dlib's own threshold, an L2 distance of 0.6 of vectors that are 1.39 long, is a cosine of 0.907
    Embedder(
        name="dlib", weights="dlib_resnet", artifact="face-embedder-dlib", width=128,
        side=150, template="dlib", geometry="dlib150", threshold=0.907,
    ),
)  # fmt: skip
EMBEDDERS = {embedder.name: embedder for embedder in _KNOWN}
DEFAULT = "fr_feature"


def embedder(name: str = "", *, gallery: str | Path | None = None) -> Embedder:
    """The embedder of that name; without one, that of the vectors in `gallery`, else the default.

    Raises NotFound for an unknown name, Denied for a gallery whose vectors none of them made.
    """
    if name and name not in EMBEDDERS:
        raise NotFound(f"unknown embedder {name!r}", hint=f"use one of {', '.join(EMBEDDERS)}")
    if not name and gallery is not None and (Path(gallery) / snapshot.MANIFEST).exists():
        space = snapshot.read_manifest(Path(gallery)).model
        for known in _KNOWN:
            if known.space == space:
                return known
        raise Denied(
            f"the gallery {gallery} holds vectors of model {space}, which no embedder here makes",
            hint="`torchship faces re-embed` moves it to another, from the faces that were kept",
        )
    return EMBEDDERS[name or DEFAULT]
