"""The files of a gallery: a manifest that is swapped atomically, one snapshot folder, one log.

`gallery.json` names the snapshot and the log that goes on from it. A new snapshot is written under a temporary name,
synced, renamed, and only then named by a new manifest: whatever moment a process dies, one whole state is on disk.
"""

from __future__ import annotations

import os
import secrets
import shutil
import zlib
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from torchship.errors import CorruptArtifact, NotFound
from torchship_faces.gallery import records
from torchship_faces.gallery.state import State

MANIFEST = "gallery.json"
_FORMAT = 1
_BLOCK = 16_384


class FileMark(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Size in bytes and CRC-32 of a file."""

    size: int
    crc32: int


class GalleryManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a gallery is: the embedding model's hash, the vectors' width, and where its state lies."""

    format: int
    model: str
    width: int
    log: str
    snapshot: str = ""
    rows: int = 0
    next_serial: int = 1
    files: dict[str, FileMark] = {}


class _Page(msgspec.Struct, array_like=True):
    """The people of a snapshot; `sets` holds the number of each person's group set as little-endian int32."""

    ids: list[str]
    sets: bytes
    group_sets: list[tuple[str, ...]]
    about: dict[int, dict[str, str]]
    pictures: dict[int, bytes]


def read_manifest(root: Path) -> GalleryManifest:
    """Raises NotFound where there is no gallery, CorruptArtifact where its manifest cannot be read."""
    try:
        found = msgspec.json.decode((root / MANIFEST).read_bytes(), type=GalleryManifest)
    except FileNotFoundError:
        raise NotFound(f"there is no gallery in {root}", hint="enrol someone first, or name another folder") from None
    except msgspec.MsgspecError as fault:
        raise CorruptArtifact(f"{root / MANIFEST}: {fault}", hint="restore the gallery from an export") from None
    if found.format != _FORMAT:
        raise CorruptArtifact(f"{root / MANIFEST} has format {found.format}, this torchship reads {_FORMAT}")
    return found


def write_manifest(root: Path, manifest: GalleryManifest) -> None:
    """Swap the manifest in one step, on disk when this returns."""
    temporary = root / f".{MANIFEST}.{secrets.token_hex(4)}"
    records.write(temporary, msgspec.json.format(msgspec.json.encode(manifest)))
    temporary.rename(root / MANIFEST)
    sync_folder(root)


def begin(root: Path, *, model: str, width: int) -> GalleryManifest:
    """Make an empty gallery in `root`."""
    log = _name("log")
    records.create(root / log)
    manifest = GalleryManifest(_FORMAT, model, width, log)
    write_manifest(root, manifest)
    return manifest


def sync_folder(folder: Path) -> None:
    """See the names in a folder onto the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load(root: Path, manifest: GalleryManifest) -> tuple[State, bytes]:
    """The state of the snapshot, its vectors mapped, and the packed codes that lay beside it.

    The sizes of all files and the checksums of all but the vectors are checked. Raises CorruptArtifact;
    FileNotFoundError when another process has just replaced the snapshot.
    """
    if not manifest.snapshot:
        state = State(manifest.width)
        state.next_serial = manifest.next_serial
        return state, b""
    folder = root / manifest.snapshot
    for name, mark in manifest.files.items():
        size = (folder / name).stat().st_size
        if size != mark.size:
            text = f"{folder / name} has {size} bytes, expected {mark.size}"
            raise CorruptArtifact(text, hint="restore it from an export")
    data = {name: _read(folder / name, manifest.files[name]) for name in ("rows.bin", "people.msgpack", "codes.bin")}
    state = State(manifest.width, vectors=_mapped(folder / "vectors.f16", manifest.rows, manifest.width))
    page = msgspec.msgpack.decode(data["people.msgpack"], type=_Page)
    people, rows = state.people, manifest.rows
    people.ids = page.ids
    people.number = {person: number for number, person in enumerate(page.ids)}
    people.restore_groups(page.group_sets, np.frombuffer(page.sets, "<i4"))
    people.about, state.pictures = page.about, page.pictures
    parts = np.split(np.frombuffer(data["rows.bin"], np.uint8), [8 * rows, 12 * rows])
    state.serial.append(parts[0].view("<u8"))
    state.owner.append(parts[1].view("<i4"))
    state.quality.append(parts[2].view("<f4"))
    state.alive.append(np.ones(rows, np.bool_))
    state.next_serial = manifest.next_serial
    return state, data["codes.bin"]


class Writer:
    """A snapshot in the making, in a temporary folder: vectors first, then the rest, then `publish`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._folder = root / f".{_name('snapshot')}"
        self._folder.mkdir(mode=0o700)
        self._files: dict[str, FileMark] = {}

    def vectors(self, old: State) -> State:
        """Write the living rows of `old`; the new state over them, its people without the forgotten."""
        kept = np.flatnonzero(old.alive.whole())
        crc = 0
        with (self._folder / "vectors.f16").open("wb") as file:
            for start in range(0, len(kept), _BLOCK):
                block = np.ascontiguousarray(old.vectors.take(kept[start : start + _BLOCK]), "<f2").tobytes()
                crc = zlib.crc32(block, crc)
                file.write(block)
            size = file.tell()
            file.flush()
            os.fsync(file.fileno())
        self._files["vectors.f16"] = FileMark(size, crc)
        state = State(old.width, vectors=_mapped(self._folder / "vectors.f16", len(kept), old.width))
        numbers = np.fromiter(old.people.after(-1), np.int64)
        people = state.people
        people.ids = [old.people.ids[number] for number in numbers]
        people.number = {person: number for number, person in enumerate(people.ids)}
        people.restore_groups(list(old.people.group_sets), old.people.set_numbers()[numbers])
        names = np.full(len(old.people.ids) + 1, -1, np.int32)
        names[numbers] = np.arange(len(numbers))
        people.about = {int(names[number]): about for number, about in old.people.about.items()}
        state.owner.append(names[old.owner.take(kept)])
        state.serial.append(old.serial.take(kept))
        state.quality.append(old.quality.take(kept))
        state.alive.append(np.ones(len(kept), np.bool_))
        state.pictures = dict(old.pictures)
        state.next_serial = old.next_serial
        return state

    def publish(self, state: State, *, packed: bytes, model: str) -> GalleryManifest:
        """Write the rest and swap the manifest; the files that nobody needs any more are gone afterwards."""
        people = state.people
        page = _Page(people.ids, people.set_numbers().tobytes(), people.group_sets, people.about, state.pictures)
        rows = [state.serial.whole().astype("<u8"), state.owner.whole().astype("<i4")]
        rows.append(state.quality.whole().astype("<f4"))
        self._write("rows.bin", b"".join(part.tobytes() for part in rows))
        self._write("people.msgpack", msgspec.msgpack.encode(page))
        self._write("codes.bin", packed)
        sync_folder(self._folder)
        log, name = _name("log"), self._folder.name.removeprefix(".")
        records.create(self._root / log)
        self._folder.rename(self._root / name)
        sync_folder(self._root)
        manifest = GalleryManifest(
            _FORMAT, model, state.width, log, name, len(state.alive), state.next_serial, self._files
        )
        write_manifest(self._root, manifest)
        sweep(self._root, manifest)
        return manifest

    def _write(self, name: str, data: bytes) -> None:
        records.write(self._folder / name, data)
        self._files[name] = FileMark(len(data), zlib.crc32(data))


def sweep(root: Path, manifest: GalleryManifest) -> None:
    """Remove what an older state, or a writer that died, left behind. Only the writer may do this."""
    for found in root.iterdir():
        name = found.name.removeprefix(".")
        if found.name in (manifest.log, manifest.snapshot, MANIFEST) or not name.startswith(
            ("log-", "snapshot-", MANIFEST)
        ):
            continue
        if found.is_dir():
            shutil.rmtree(found, ignore_errors=True)
        else:
            found.unlink(missing_ok=True)


def _name(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(6)}"


def _mapped(path: Path, rows: int, width: int) -> NDArray[np.float16] | None:
    """The vectors of a snapshot; an empty file cannot be mapped."""
    return np.memmap(path, np.dtype("<f2"), "r", shape=(rows, width)) if rows else None


def _read(path: Path, mark: FileMark) -> bytes:
    data = path.read_bytes()
    if zlib.crc32(data) != mark.crc32:
        raise CorruptArtifact(f"{path} does not match its checksum", hint="restore the gallery from an export")
    return data
