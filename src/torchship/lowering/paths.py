"""Path patterns: `layer4.*`, `head`, `*.conv1` address submodules of the user's module."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, cast

from torchship.errors import BadConfig
from torchship.recipe import Options

if TYPE_CHECKING:
    import torch

# a Model's flat module keeps the user's own module at `inner`; wrappers keep the flat module at `flat`
FLOAT = ("fp32", "f32", "float")
_KINDS = {list: "a list of path patterns", dict: "a table of pattern = setting"}
_ABOVE = re.compile(r"^(?:flat\.)*(?:inner|flat)(?:\.|$)")


def user_path(path: str) -> str:
    """The path below the user's module: `inner.layer4.0` is `layer4.0`, `inner` is the empty path."""
    return _ABOVE.sub("", path, count=1)


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Whether `path`, or a module it lies in, fits one of the patterns; `*` also spans dots.

    The user's module itself has the empty path, which an empty pattern or `*` fits.
    """
    parts = user_path(path).split(".")
    above = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(fnmatchcase(place, pattern) for place in above for pattern in patterns)


@dataclass(frozen=True)
class Rules:
    """Which modules a narrower precision leaves alone: (pattern, whether it stays in float); the first that fits."""

    patterns: tuple[tuple[str, bool], ...]

    def spares(self, path: str) -> bool:
        """Whether the module at `path` stays in float."""
        return next((spared for pattern, spared in self.patterns if matches(path, [pattern])), False)


def rules(options: Options, *, narrow: Sequence[str], key: str = "exclude", module: torch.nn.Module) -> Rules:
    """What `options[key]` (a list of patterns that stay in float) and `options["modules"]` ({"backbone.*": "int8",
    "head": "fp32"}) say: the list goes before the table, of whose patterns the longest that fits decides. `narrow` are
    the settings that the caller can give. Raises BadConfig, also for a pattern that fits nothing inside `module`.
    """
    patterns = addressed(options)
    listed, table = cast("list[str]", options.get(key) or []), cast("dict[str, str]", options.get("modules") or {})
    for pattern, setting in table.items():
        if setting not in (*FLOAT, *narrow):
            raise BadConfig(f"modules: {pattern!r} is {setting!r}", hint=f"use {' or '.join((*narrow, FLOAT[0]))}")
    refuse_strangers(patterns, module=module)
    longest_first = sorted(table, key=len, reverse=True)
    chosen = ((pattern, table[pattern] in FLOAT) for pattern in longest_first)
    return Rules((*((pattern, True) for pattern in listed), *chosen))


def refuse_strangers(patterns: Sequence[str], *, module: torch.nn.Module) -> None:
    """Raise BadConfig for a pattern that fits no module: it would silently do nothing."""
    if not patterns:
        return
    there = {user_path(path) for path, _ in module.named_modules(remove_duplicate=False)}
    for pattern in patterns:
        if not any(matches(path, [pattern]) for path in there):
            near = get_close_matches(pattern.rstrip(".*"), there, n=3, cutoff=0.5) or sorted(there - {""})[:3]
            raise BadConfig(f"no module fits {pattern!r}", hint=f"there is {', '.join(near)}")


def addressed(options: Options) -> list[str]:
    """All patterns that a recipe's options hold. Raises BadConfig where they are neither a list nor a table."""
    found: list[str] = []
    for key, kind in (("exclude", list), ("keep", list), ("modules", dict)):
        value = options.get(key) or kind()
        if not isinstance(value, kind):
            raise BadConfig(f"{key} wants {_KINDS[kind]}")
        found += value
    return found


def refuse_any(options: Options, *, what: str) -> None:
    """Raise BadConfig where patterns are given to `what`, which treats all modules alike."""
    if found := addressed(options):
        raise BadConfig(
            f"{what} treats all modules alike, and cannot address {found[0]!r}", hint="see docs/optimize.md"
        )
