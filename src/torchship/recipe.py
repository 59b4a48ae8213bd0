"""The Recipe: how an artifact is made, as plain data that ends up in its manifest."""

from __future__ import annotations

import hashlib
from typing import TypeAlias

import msgspec

Option: TypeAlias = bool | int | float | str | list[str] | dict[str, str] | None
Options: TypeAlias = dict[str, Option]


class Step(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One transform of `optimize/transforms` and its options."""

    transform: str
    options: Options = {}


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A backend with its options, after transforms applied in order."""

    backend: str
    options: Options = {}
    transforms: tuple[Step, ...] = ()

    @property
    def label(self) -> str:
        """A short name for tables: `onnxruntime precision=int8 + layout`."""
        words = [self.backend, *(f"{key}={value}" for key, value in sorted(self.options.items()))]
        return " + ".join([" ".join(words), *(step.transform for step in self.transforms)])

    @property
    def key(self) -> str:
        """A stable 16-digit hash of the content: the name of the trial's folder and cache entry."""
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()[:16]
