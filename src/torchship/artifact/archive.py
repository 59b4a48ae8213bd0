"""One artifact as one .tar or .zip file: written reproducibly, and read as if an enemy had made it."""

from __future__ import annotations

import io
import os
import shutil
import stat
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO

from torchship import home
from torchship.artifact import folder as folders
from torchship.artifact.folder import MANIFEST, MAX_FILES, SIGNATURE
from torchship.artifact.opening import Artifact, open_artifact
from torchship.errors import BadConfig, CorruptArtifact, NotFound, Unavailable, UnsafeArtifact

MAX_RATIO = 200
SUFFIXES = (".tar", ".zip", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_WRITTEN = SUFFIXES[:2]
_LITTER = (".DS_Store", "Thumbs.db", "desktop.ini")


@dataclass(frozen=True)
class _Member:
    """One file of an archive: its unchecked path, its declared size, and how to read it."""

    path: str
    size: int
    open: Callable[[], IO[bytes]]


def export(folder: Path | str, *, to: Path | str) -> Path:
    """Write the artifact in `folder` to a .tar or .zip file, the manifest first. Equal artifacts give equal files.

    Raises BadConfig for another suffix, and what `open_artifact` raises.
    """
    check_suffix(Path(to))
    artifact = open_artifact(folder)
    return write(artifact.path, [entry.path for entry in artifact.manifest.files], to=to)


def write(root: Path, paths: Sequence[str], *, to: Path | str) -> Path:
    """Write the manifest in `root`, its signature where there is one, and the files `paths` to a .tar or .zip file.

    Equal files give an equal archive. Raises BadConfig for another suffix.
    """
    target = Path(to)
    check_suffix(target)
    paths = [MANIFEST, *([SIGNATURE] if (root / SIGNATURE).is_file() else []), *paths]
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        (_write_tar if target.suffix == ".tar" else _write_zip)(temporary, root, paths)
        folders.sync(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def check_suffix(path: Path, suffixes: tuple[str, ...] = _WRITTEN) -> None:
    """Raise BadConfig for a name that does not say which kind of archive it is of."""
    if not path.name.lower().endswith(suffixes):
        raise BadConfig(f"{path.name}: not an archive's name", hint=f"end it with {' or '.join(suffixes)}")


def _write_tar(target: Path, root: Path, paths: Sequence[str]) -> None:
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as archive:
        for path in paths:
            with os.fdopen(folders.open_file(root, path), "rb") as file:
                info = tarfile.TarInfo(path)
                info.size, info.mode = os.fstat(file.fileno()).st_size, 0o644
                archive.addfile(info, file)


def _write_zip(target: Path, root: Path, paths: Sequence[str]) -> None:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for path in paths:
            info = zipfile.ZipInfo(path)
            info.external_attr = (stat.S_IFREG | 0o644) << 16
            given = os.fdopen(folders.open_file(root, path), "rb")
            with given, archive.open(info, "w", force_zip64=True) as entry:
                shutil.copyfileobj(given, entry, 2**20)


@contextmanager
def extracted(archive: Path | str) -> Iterator[Artifact]:
    """The verified artifact of an archive in a temporary folder, gone at the end of the `with` block.

    A .zip, or a .tar, compressed or not, as any tool packs the folder: with `./`, from above, on a Mac or on Windows.

    Only plain files are written, no more bytes than the archive declares, and what it declares is bounded; then the
    folder is checked as any artifact's.
    Raises NotFound, BadConfig, UnsafeArtifact, CorruptArtifact, Unsupported for an unknown format version.
    """
    with tempfile.TemporaryDirectory(prefix="torchship-") as place:
        root = Path(place) / home.expand(archive).name
        unpack(archive, to=root)
        yield open_artifact(root)


def unpack(archive: Path | str, *, to: Path) -> None:
    """Write the files of an archive below the new folder `to`, which is not verified yet.

    Raises NotFound, BadConfig, UnsafeArtifact for what would leave the folder or grow beyond bounds, CorruptArtifact.
    """
    path = home.expand(archive)
    check_suffix(path, SUFFIXES)
    if not path.is_file():
        raise NotFound(f"no file {path}")
    try:
        with _opened(path) as members:
            _extract(members, to, packed=path.stat().st_size, name=path.name)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, OSError) as fault:
        raise CorruptArtifact(f"{path.name} cannot be read: {fault}", hint="export or copy it again") from None


@contextmanager
def _opened(path: Path) -> Iterator[list[_Member]]:
    """The members, one more than are allowed at most."""
    if path.name.lower().endswith(".zip"):
        with zipfile.ZipFile(path) as archive:
            yield list(islice(_zip_members(archive), MAX_FILES + 1))
    else:
        with tarfile.open(path, "r:" if path.suffix.lower() == ".tar" else "r:*") as tar:
            limit = max(path.stat().st_size, 1) * MAX_RATIO
            yield list(islice(_tar_members(tar, limit=limit), MAX_FILES + 1))


def _path(name: str) -> str:
    """A member's name without the `./` that tar puts before it; empty for the folder itself. Raises UnsafeArtifact."""
    while name.startswith("./"):
        name = name[2:]
    return "" if name in ("", ".") else folders.check_path(name.rstrip("/"))


def _tar_members(archive: tarfile.TarFile, *, limit: int) -> Iterator[_Member]:
    for info in archive:
        if info.offset_data + info.size > limit:
            raise UnsafeArtifact(f"{info.name} would grow the archive over {limit} bytes", hint="do not open it")
        path = _path(info.name)
        if info.isdir():
            continue
        if not info.isreg() or info.issparse():
            raise UnsafeArtifact(f"{info.name!r} is not a plain file", hint="an artifact holds plain files only")
        yield _Member(path, info.size, lambda info=info: archive.extractfile(info) or io.BytesIO())  # type: ignore[misc]


def _zip_members(archive: zipfile.ZipFile) -> Iterator[_Member]:
    for info in archive.infolist():
        kind = stat.S_IFMT(info.external_attr >> 16)
        name = info.filename if "/" in info.filename else info.filename.replace("\\", "/")  # as old Windows packs
        path = _path(name)
        if name.endswith("/"):
            continue
        if kind not in (0, stat.S_IFREG) or info.flag_bits & 0x1:
            raise UnsafeArtifact(f"{info.filename!r} is not a plain file", hint="an artifact holds plain files only")
        yield _Member(path, info.file_size, lambda info=info: archive.open(info))  # type: ignore[misc]


def _extract(members: list[_Member], root: Path, *, packed: int, name: str) -> None:
    if len(members) > MAX_FILES:
        raise UnsafeArtifact(f"the archive holds more than {MAX_FILES} files", hint="do not open this archive")
    members = [member for member in members if not _is_litter(member.path)]
    tops = {member.path.partition("/")[0] for member in members}
    top = f"{tops.pop()}/" if len(tops) == 1 and not any(member.path == MANIFEST for member in members) else ""
    found = {member.path.removeprefix(top): member for member in members}
    if len(found) != len(members):
        raise UnsafeArtifact(f"{name} holds a file twice", hint="do not open this archive")
    if MANIFEST not in found:
        raise CorruptArtifact(f"{name} has no {MANIFEST}", hint="this is no exported artifact")
    total = sum(member.size for member in members)
    if total > max(packed, 1) * MAX_RATIO:
        raise UnsafeArtifact(f"{name} would grow {total // max(packed, 1)} times", hint="do not open this archive")
    if total > shutil.disk_usage(root.parent).free:
        raise Unavailable(
            f"{name} needs {total} bytes, {root.parent} has fewer left", hint="set TMPDIR to a larger disk"
        )
    for path, member in found.items():
        _write_member(member, root / path)


def _is_litter(path: str) -> bool:
    """What desktops leave in folders, and a Mac in archives."""
    last = path.rpartition("/")[2]
    return path.startswith("__MACOSX/") or last.startswith("._") or last in _LITTER


def _write_member(member: _Member, target: Path) -> None:
    """Write at most the declared bytes, whatever the compressed stream would give."""
    target.parent.mkdir(parents=True, exist_ok=True)
    left = member.size
    with member.open() as source, open(target, "xb") as file:
        while block := source.read(min(2**20, left + 1)):
            left -= len(block)
            if left < 0:
                raise UnsafeArtifact(f"{member.path} is larger than declared", hint="do not open this archive")
            file.write(block)
