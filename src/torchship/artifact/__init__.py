"""Artifacts: an immutable folder that holds a model as it was measured, and the store that keeps them."""

from __future__ import annotations

from pathlib import Path

from torchship.artifact.opening import Artifact, open_artifact
from torchship.artifact.store import Store
from torchship.stage import Stage

__all__ = ["Artifact", "Store", "open_artifact", "open_stage"]


def open_stage(
    target: Path | str, *, store: Store | None = None, device: str = "cpu", threads: int = 0, trust: bool = False
) -> Stage:
    """Open an artifact as a Stage: a folder, or `name`, `name@current` or `name@3` in the store.

    `threads=0` takes as many as there are cores; `trust` allows native code. Raises NotFound, ArtifactError,
    Unavailable when its backend cannot run here.
    """
    path = target if isinstance(target, Path) else (store or Store()).resolve(target)
    return open_artifact(path).open(device=device, threads=threads, trust=trust)
