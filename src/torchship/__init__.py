"""torchship: a Model is optimized into an Artifact, opened as a Stage, and served on a Line."""

from __future__ import annotations

__version__ = "0.1.0"
