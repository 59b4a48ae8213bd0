"""The folder of a gallery: one file an identity, each replaced in one step, so that a killed process leaves none torn.

    gallery.msgpack      the embedder, the next numbers, the learned travel times
    identity-12.msgpack  its visits with embeddings and crops
    lock                 held by the one process that writes

A file is a checksum (CRC-32) and MessagePack. An identity that is forgotten is a file that is removed: nothing of it
stands anywhere else. A merge and a split touch two files; a process that dies between them leaves a visit in both, and
the one with the higher revision has it.
"""

from __future__ import annotations

import fcntl
import os
import zlib
from pathlib import Path
from typing import TypeVar

import msgspec

from torchship.errors import BadConfig, CorruptArtifact, Unavailable
from torchship_video.identity.visits import Visit

_FORMAT = 1
_SHARED = "gallery.msgpack"
_Kind = TypeVar("_Kind", bound=msgspec.Struct)


class SavedGallery(msgspec.Struct, frozen=True):
    """What belongs to no single identity. Numbers below `next_identity` and `next_serial` may have been given."""

    format: int
    embedder: str
    width: int
    next_identity: int = 1
    next_serial: int = 1
    times: list[tuple[str, str, list[float]]] = []


class SavedIdentity(msgspec.Struct, frozen=True):
    """One identity's file."""

    number: int
    revision: int
    visits: list[Visit]


class Storage:
    """The one writer of a folder. Not called from two threads at once."""

    def __init__(self, root: Path, *, embedder: str, width: int) -> None:
        """Raises Unavailable while another process writes it, BadConfig when it is another embedder's."""
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._root = root
        self._lock = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._revision = 0
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise Unavailable(
                f"another process writes the identities in {root}", hint="end it, or name another folder"
            ) from None
        try:
            self.shared = self._read_shared(embedder, width)
        except BaseException:
            self.close()
            raise

    def _read_shared(self, embedder: str, width: int) -> SavedGallery:
        for left in self._root.glob(".*.new"):  # of a process that died while it wrote
            left.unlink()
        path = self._root / _SHARED
        if not path.exists():
            return SavedGallery(_FORMAT, embedder, width)
        found = _read(path, SavedGallery)
        if (found.format, found.embedder, found.width) != (_FORMAT, embedder, width):
            raise BadConfig(
                f"the identities in {self._root} are {found.embedder}'s with {found.width} numbers (format "
                f"{found.format}), here is {embedder} with {width}",
                hint="embeddings of two embedders cannot be compared: name another folder, or remove this one",
            )
        return found

    def load(self) -> dict[int, list[Visit]]:
        """All identities; a visit that stands in two files belongs to the newer one."""
        saved = [_read(path, SavedIdentity) for path in self._root.glob("identity-*.msgpack")]
        owner: dict[int, SavedIdentity] = {}
        for one in sorted(saved, key=lambda one: one.revision):
            owner.update({visit.serial: one for visit in one.visits})
            self._revision = max(self._revision, one.revision)
        found = {
            one.number: [visit for visit in one.visits if owner[visit.serial] is one]
            for one in sorted(saved, key=lambda one: one.number)
        }
        for number in [number for number, visits in found.items() if not visits]:
            del found[number]
            self.remove([number])
        return found

    def save(self, identities: dict[int, bytes]) -> None:
        """Write identities as `encode` gave them, in that order."""
        for number, data in identities.items():
            self._replace(self._path(number).name, data)
        self._sync()

    def encode(self, number: int, visits: list[Visit]) -> bytes:
        """An identity's file, newer than all before."""
        self._revision += 1
        return msgspec.msgpack.encode(SavedIdentity(number, self._revision, visits))

    def save_shared(self, shared: SavedGallery) -> None:
        """Write what belongs to no single identity."""
        self._replace(_SHARED, msgspec.msgpack.encode(shared))
        self._sync()
        self.shared = shared

    def remove(self, numbers: list[int]) -> None:
        """Remove identities from the disk; they are gone when this returns."""
        for number in numbers:
            self._path(number).unlink(missing_ok=True)
        self._sync()

    def close(self) -> None:
        """Let another process write."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _path(self, number: int) -> Path:
        return self._root / f"identity-{number}.msgpack"

    def _replace(self, name: str, data: bytes) -> None:
        temporary = self._root / f".{name}.new"
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(zlib.crc32(data).to_bytes(4, "little") + data)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(self._root / name)
        except OSError as fault:
            temporary.unlink(missing_ok=True)
            raise Unavailable(
                f"{self._root / name} could not be written: {fault.strerror}", hint="make room on that disk"
            ) from None

    def _sync(self) -> None:
        folder = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _read(path: Path, kind: type[_Kind]) -> _Kind:
    data = path.read_bytes()
    try:
        if int.from_bytes(data[:4], "little") != zlib.crc32(data[4:]):
            raise msgspec.DecodeError("its checksum is wrong")
        return msgspec.msgpack.decode(data[4:], type=kind)
    except msgspec.MsgspecError as fault:
        raise CorruptArtifact(
            f"{path} cannot be read: {fault}", hint="the disk or another program changed it: remove it to go on without"
        ) from None
