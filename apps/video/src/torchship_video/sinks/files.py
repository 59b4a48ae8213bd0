"""Files of lines that survive their writer: whole lines, one write each, old files set aside by size."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from torchship.errors import BadConfig

_TAIL = 1 << 20  # no line is longer


def path_of(pattern: str, camera: str) -> Path:
    """The file of a camera: `{camera}` in a pattern is its name, with an underscore for what has no place in names."""
    return Path(pattern.replace("{camera}", re.sub(r"[^\w.\-]", "_", camera) or "_")).expanduser()


class CameraPaths:
    """The files of several cameras by one pattern."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._owners: dict[Path, str] = {}

    def __call__(self, camera: str) -> Path:
        """The file of a camera. Raises BadConfig where two cameras would write to one."""
        path = path_of(self._pattern, camera)
        if (owner := self._owners.setdefault(path, camera)) != camera:
            raise BadConfig(
                f"the cameras {owner!r} and {camera!r} would both write to {path}",
                hint="put {camera} into the path: a file for each camera",
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


class LineFile:
    """A file of lines. A last line that is torn, as its writer died, is cut off when the file is opened."""

    def __init__(self, path: Path, *, fresh: bool = False, limit: int = 0, keep: int = 0) -> None:
        """`fresh` begins a new file; at `limit` bytes (0: never) it becomes `path.1`, and `keep` old ones are kept."""
        self._path, self._limit, self._keep = path, limit, keep
        path.parent.mkdir(parents=True, exist_ok=True)
        self._open(fresh=fresh)

    def write(self, line: bytes) -> None:
        """Append one line, its end included. Raises OSError, for example when the disk is full."""
        if self._limit and self._size and self._size + len(line) > self._limit:
            self._rotate()
        rest = memoryview(line)
        while rest:
            rest = rest[os.write(self._file, rest) :]
        self._size += len(line)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _open(self, *, fresh: bool = False) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | (os.O_TRUNC if fresh else 0)
        self._file = os.open(self._path, flags, 0o644)
        self._size = os.fstat(self._file).st_size
        start = max(0, self._size - _TAIL)
        tail = os.pread(self._file, self._size - start, start) if self._size else b""
        if tail and not tail.endswith(b"\n"):
            self._size = start + tail.rfind(b"\n") + 1
            os.ftruncate(self._file, self._size)

    def _rotate(self) -> None:
        os.close(self._file)
        for number in range(self._keep, 0, -1):
            younger = self._path.with_name(f"{self._path.name}.{number - 1}") if number > 1 else self._path
            with suppress(FileNotFoundError):
                os.replace(younger, self._path.with_name(f"{self._path.name}.{number}"))
        self._open(fresh=True)
