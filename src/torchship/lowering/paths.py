"""Path patterns: `layer4.*`, `head`, `*.conv1` address submodules of the user's module."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

FLAT = "inner"  # the flat module of a Model keeps the user's own module here


def user_path(path: str) -> str:
    """The path below the user's module: `inner.layer4.0` is `layer4.0`, `inner` is the empty path."""
    return "" if path == FLAT else path.removeprefix(f"{FLAT}.")


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Whether `path`, or a module it lies in, fits one of the patterns; `*` also spans dots."""
    path = user_path(path)
    parts = path.split(".")
    above = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(fnmatchcase(place, user_path(pattern)) for place in above for pattern in patterns)
