"""The Recipe: how an artifact is made, as plain data that ends up in its manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeAlias

import msgspec

from torchship.errors import BadConfig

Option: TypeAlias = bool | int | float | str | list[str] | dict[str, str] | None
Options: TypeAlias = dict[str, Option]
FINETUNE, PRUNE = "finetune", "prune"  # steps that stand for weights of their own: no transform has these names


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
        """A short name for tables: `onnxruntime precision=int8 + quantize scheme=dynamic`."""
        parts = [_words(self.backend, self.options), *(_words(s.transform, s.options) for s in self.transforms)]
        return " + ".join(parts)

    @property
    def weights(self) -> str:
        """Which weights it builds: those of the model as it came (empty), fine-tuned ones, or those of a round of
        pruning."""
        named = (
            f"{s.transform}{s.options.get('round', '')}" for s in self.transforms if s.transform in (FINETUNE, PRUNE)
        )
        return next(named, "")

    @property
    def key(self) -> str:
        """A stable 16-digit hash of the content: the name of the trial's folder and cache entry."""
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()[:16]


def choice(options: Options, key: str, known: Sequence[str], *, of: str) -> str:
    """The word that an option of backend `of` holds, the first of the known ones by default. Raises BadConfig."""
    found = str(options.get(key, known[0]))
    if found not in known:
        raise BadConfig(f"{of}: {key} {found!r} is unknown", hint=f"use one of {', '.join(known)}")
    return found


def _words(name: str, options: Options) -> str:
    return " ".join([name, *(f"{key}={_brief(value)}" for key, value in sorted(options.items()))])


def _brief(value: Option) -> str:
    """Long lists are told by their length."""
    return f"({len(value)})" if isinstance(value, list | dict) and len(value) > 2 else str(value)
