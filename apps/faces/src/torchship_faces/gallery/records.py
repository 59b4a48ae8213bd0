"""The write-ahead log of a gallery: framed, checksummed records, on disk before they are acknowledged.

A log is a 16-byte head (magic, format, CRC) and frames. A frame is a 12-byte head (payload length, CRC-32 of the
payload, CRC-32 of those eight bytes) and a msgpack payload. A process that dies while it writes leaves a frame that is
too short (or zeros, after a power cut): that tail was never acknowledged and is cut off by the next writer. Anything
else that does not check is damage, and is said so.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from torchship.errors import CorruptArtifact, Unavailable

_MAGIC = b"TSGALLOG"
_FORMAT = 1
_START = struct.Struct("<8sII")
_FRAME = struct.Struct("<III")
HEAD, FRAME = _START.size, _FRAME.size
_LARGEST = 1 << 28


class Template(msgspec.Struct, frozen=True, array_like=True):
    """One enrolled vector: unit length, float16, little endian. `picture` is the SHA-256 of the kept face, or empty."""

    serial: int
    vector: bytes
    quality: float = 0.0
    picture: bytes = b""


class Put(msgspec.Struct, frozen=True, array_like=True, tag="put"):
    """Add templates to a person, who is made when unknown. `replace` drops what was there."""

    person: str
    templates: tuple[Template, ...]
    groups: tuple[str, ...] = ()
    about: dict[str, str] = {}
    replace: bool = False
    at: float = 0.0


class ForgetRecord(msgspec.Struct, frozen=True, array_like=True, tag="forget"):
    """Drop one template of a person, or the person (`serial` 0, which no template has)."""

    person: str
    serial: int = 0
    at: float = 0.0


Record = Put | ForgetRecord
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Record).decode


def write(path: Path, data: bytes, *, mode: str = "wb") -> None:
    """Write a file and see it onto the disk."""
    with path.open(mode) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def create(path: Path) -> None:
    """Make an empty log at `path`."""
    write(path, _START.pack(_MAGIC, _FORMAT, zlib.crc32(_MAGIC + _FORMAT.to_bytes(4, "little"))), mode="xb")


def check(head: bytes, *, path: Path) -> None:
    """Raise CorruptArtifact unless `head` begins a log of ours."""
    magic, version, crc = _START.unpack(head) if len(head) == HEAD else (b"", 0, 0)
    if magic != _MAGIC or version != _FORMAT or crc != zlib.crc32(_MAGIC + _FORMAT.to_bytes(4, "little")):
        raise CorruptArtifact(f"{path} is not a gallery log of format {_FORMAT}", hint="restore it from an export")


def frame(record: Record) -> bytes:
    """A record as it lies in the log."""
    payload = _encode(record)
    head = struct.pack("<II", len(payload), zlib.crc32(payload))
    return head + zlib.crc32(head).to_bytes(4, "little") + payload


def append(file: int, records: Sequence[Record], *, at: int) -> tuple[int, int]:
    """Write records at offset `at` and wait for the disk; where the last one begins and ends. All count, or none.

    Raises Unavailable when the disk refuses them; the log is then as it was.
    """
    frames = [frame(record) for record in records]
    data = b"".join(frames)
    try:
        written = 0
        while written < len(data):
            written += os.pwrite(file, data[written:], at + written)
        os.fdatasync(file)
    except OSError as fault:
        try:
            os.ftruncate(file, at)
        except OSError:
            pass  # the torn tail is cut off by the next writer
        raise Unavailable(
            f"the gallery could not be written: {fault.strerror}", hint="nothing was enrolled; make room and try again"
        ) from None
    end = at + len(data)
    return (end - len(frames[-1]) if frames else at), end


def read(file: int, *, start: int, path: Path) -> Iterator[tuple[Record, int]]:
    """The records from offset `start`, each with the offset behind it; stops before a torn tail.

    Raises CorruptArtifact for damage anywhere else.
    """
    size = os.fstat(file).st_size
    if size <= start:
        return
    data = os.pread(file, size - start, start)
    while len(data) < size - start:  # a single read is bounded to 2 GiB
        more = os.pread(file, size - start - len(data), start + len(data))
        if not more:
            break
        data += more
    position = 0
    while len(data) - position >= _FRAME.size:
        length, crc, head_crc = _FRAME.unpack_from(data, position)
        if zlib.crc32(data[position : position + 8]) != head_crc or length > _LARGEST:
            if not any(data[position + _FRAME.size :]):
                return
            raise _damage(path, start + position)
        end = position + _FRAME.size + length
        if end > len(data):
            return
        payload = data[position + _FRAME.size : end]
        if zlib.crc32(payload) != crc:
            if end == len(data) or not any(data[end:]):
                return
            raise _damage(path, start + position)
        try:
            record = _decode(payload)
        except msgspec.MsgspecError:
            raise _damage(path, start + position) from None
        position = end
        yield record, start + end


def _damage(path: Path, offset: int) -> CorruptArtifact:
    return CorruptArtifact(
        f"{path}: the record at byte {offset} is damaged, and it is not the last one",
        hint="restore the gallery from an export; the disk or another program changed the file",
    )
