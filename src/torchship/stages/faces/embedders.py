"""The embedders that are known: their weights, the geometry of their chips, and the name of their vector space."""

from __future__ import annotations

from dataclasses import dataclass

from torchship.errors import NotFound
from torchship.stages.faces.weights import WEIGHTS


@dataclass(frozen=True, kw_only=True)
class Embedder:
    """`width` numbers a vector, chips of `side` pixels; `threshold` is a sensible similarity to call two faces one."""

    name: str
    weights: str
    width: int
    side: int
    geometry: str
    threshold: float

    @property
    def space(self) -> str:
        """Names the vectors' space: vectors of two spaces must never be compared. Precision does not change it."""
        return f"{self.name}-{WEIGHTS[self.weights].sha256[:16]}-{self.geometry}"


_KNOWN = (
    Embedder(name="fr_feature", weights="fr_feature", width=512, side=112, geometry="arcface112-bgr", threshold=0.45),
)
EMBEDDERS = {embedder.name: embedder for embedder in _KNOWN}


def embedder(name: str = "fr_feature") -> Embedder:
    """Raises NotFound for an unknown name."""
    if name not in EMBEDDERS:
        raise NotFound(f"unknown embedder {name!r}", hint=f"use one of {', '.join(EMBEDDERS)}")
    return EMBEDDERS[name]
