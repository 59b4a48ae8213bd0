"""Path patterns: `layer4.*`, `head`, `*.conv1` address submodules of the user's module."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

# a Model's flat module keeps the user's own module at `inner`; wrappers keep the flat module at `flat`
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
