"""Path patterns: `layer4.*`, `head`, `*.conv1` address submodules of the user's module."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torchship.errors import BadConfig
from torchship.recipe import Options

# a Model's flat module keeps the user's own module at `inner`; wrappers keep the flat module at `flat`
FLOAT = ("fp32", "f32", "float")
_ABOVE = re.compile(r"^(?:flat\.)*(?:inner|flat)(?:\.|$)")


def user_path(path: str) -> str:
    """The path below the user's module: `inner.layer4.0` is `layer4.0`, `inner` is the empty path."""
    return _ABOVE.sub("", path, count=1)


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Whether `path`, or a module it lies in, fits one of the patterns; `*` also spans dots."""
    path = user_path(path)
    parts = path.split(".")
    above = [".".join(parts[: i + 1]) for i in range(len(parts))] if path else []
    return any(fnmatchcase(place, pattern) for place in above for pattern in patterns)


@dataclass(frozen=True)
class Rules:
    """Which modules a narrower precision leaves alone: (pattern, whether it stays in float); the first that fits."""

    patterns: tuple[tuple[str, bool], ...]

    def spares(self, path: str) -> bool:
        """Whether the module at `path` stays in float."""
        return next((spared for pattern, spared in self.patterns if matches(path, [pattern])), False)


def rules(options: Options, *, narrow: Sequence[str], key: str = "exclude") -> Rules:
    """What `options[key]` (a list of patterns that stay in float) and `options["modules"]` ({"backbone.*": "int8",
    "head": "fp32"}) say; of the table's patterns the longest that fits decides. `narrow` are the settings that
    the caller can give. Raises BadConfig.
    """
    listed, table = options.get(key) or [], options.get("modules") or {}
    if not isinstance(listed, list) or not isinstance(table, dict):
        raise BadConfig(f"{key} wants a list of path patterns, modules a table of pattern = setting")
    for pattern, setting in table.items():
        if setting not in (*FLOAT, *narrow):
            raise BadConfig(f"modules: {pattern!r} is {setting!r}", hint=f"use {' or '.join((*narrow, FLOAT[0]))}")
    longest_first = sorted(table, key=len, reverse=True)
    chosen = ((pattern, table[pattern] in FLOAT) for pattern in longest_first)
    return Rules((*((pattern, True) for pattern in listed), *chosen))
