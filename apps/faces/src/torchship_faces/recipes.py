"""The face pipelines as plain data: the same that a TOML file holds."""

from __future__ import annotations

from typing import Any

from torchship_faces.embedders import Embedder, embedder

DETECTOR = "face-detector"
DETECT_OUTPUTS = ("box", "score", "points")
FACE_OUTPUTS = (*DETECT_OUTPUTS, "quality", "embedding")
MATCH_OUTPUTS = (*FACE_OUTPUTS, "person", "known", "similarity", "nearest", "answer")


def embed(*, model: Embedder | None = None, copies: int = 1) -> dict[str, Any]:
    """Picture in, faces out with their `quality` and `embedding` by `model`."""
    model = model or embedder()
    stages = [
        {"run": "torchship_faces:Open", "copies": copies},
        {"artifact": DETECTOR, "name": "detect", "threads": 1, "copies": copies},
        {"run": "torchship_faces:Find"},
        {"run": "torchship_faces:Align", "options": {"side": model.side, "template": model.template}},
        {"artifact": model.artifact, "name": "embed", "threads": 1, "copies": copies},
    ]
    return {"name": "face-embed", "stages": stages, "outputs": list(FACE_OUTPUTS)}


def identify(gallery: str, *, model: Embedder | None = None, copies: int = 1) -> dict[str, Any]:
    """Picture in, faces out with the `person` that each is, if any; `answer` is the same as JSON."""
    model = model or embedder()
    stages = [
        *embed(model=model, copies=copies)["stages"],
        {
            "run": "torchship_faces.gallery:Match",
            "options": {"gallery": gallery, "model": model.space, "width": model.width},
            "parameters": {"threshold": model.threshold},
        },
        {"run": "torchship_faces:answer"},
    ]
    return {"name": "faces", "stages": stages, "outputs": list(MATCH_OUTPUTS)}
