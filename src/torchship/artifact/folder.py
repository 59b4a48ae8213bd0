"""An artifact's folder: walked without following a link, hashed, and written so that a crash leaves no half files."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from torchship.errors import CorruptArtifact, NotFound, Unavailable, UnsafeArtifact

MANIFEST = "manifest.json"
SIGNATURE = "manifest.sig"
MAX_FILES = 10_000
MAX_BYTES = 256 * 2**30


def check_path(path: str) -> str:
    """`path` when it names a file below the folder on every system. Raises UnsafeArtifact otherwise."""
    parts = path.split("/")
    bad = any(part in ("", ".", "..") or len(part) > 255 for part in parts)
    if bad or len(path) > 1024 or any(letter in path for letter in "\\:\0\n") or PurePosixPath(path).is_absolute():
        raise UnsafeArtifact(f"file name {path!r} leaves the artifact's folder", hint="do not open this artifact")
    return path


def files_below(folder: Path) -> dict[str, os.stat_result]:
    """Every file below `folder` by its path with slashes.

    Raises NotFound when there is no such folder; UnsafeArtifact for a link, a device or too many files.
    """
    if not folder.is_dir():
        raise NotFound(f"no artifact at {folder}", hint="`torchship store list` shows what is published")
    found: dict[str, os.stat_result] = {}
    for path, info in _walk(folder, ""):
        if len(found) >= MAX_FILES:
            raise UnsafeArtifact(f"{folder} holds more than {MAX_FILES} files", hint="an artifact holds a few")
        found[path] = info
    return found


def _walk(folder: Path, prefix: str) -> Iterator[tuple[str, os.stat_result]]:
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            path = prefix + entry.name
            info = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(info.st_mode):
                yield from _walk(folder / entry.name, path + "/")
            elif stat.S_ISREG(info.st_mode):
                yield path, info
            else:
                what = "a link" if stat.S_ISLNK(info.st_mode) else "not a plain file"
                raise UnsafeArtifact(f"{path} is {what}", hint="an artifact holds plain files only")


def open_file(folder: Path, path: str) -> int:
    """A file descriptor for reading a plain file; never follows a link. Raises CorruptArtifact."""
    try:
        found = os.open(folder / check_path(path), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as fault:
        raise CorruptArtifact(f"{path} cannot be read: {fault.strerror}", hint="publish the artifact again") from None
    if not stat.S_ISREG(os.fstat(found).st_mode):
        os.close(found)
        raise CorruptArtifact(f"{path} is no file", hint="publish the artifact again")
    return found


def sha256(folder: Path, path: str) -> str:
    """The hash of one file's content, as hex digits."""
    with os.fdopen(open_file(folder, path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(folder: Path, path: str, *, limit: int) -> bytes:
    """The content of a small file. Raises UnsafeArtifact when it is larger than `limit` bytes."""
    with os.fdopen(open_file(folder, path), "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise UnsafeArtifact(f"{path} is larger than {limit} bytes", hint="do not open this artifact")
    return data


@contextlib.contextmanager
def room(path: Path, *, verb: str = "written") -> Iterator[None]:
    """Turns a full disk, a quota, a read-only file system or missing rights into Unavailable, naming the place."""
    try:
        yield
    except OSError as fault:
        if fault.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            hint = "make room, or name another place"
        elif fault.errno in (errno.EACCES, errno.EPERM):
            path, hint = Path(fault.filename or path), "ask its owner for the right, or name another place"
        else:
            raise
        raise Unavailable(f"{path} cannot be {verb}: {fault.strerror}", hint=hint) from fault


def make(path: Path) -> None:
    """Make a folder and those above it, shared as the one they lie in is."""
    if not path.is_dir():
        make(path.parent)
        path.mkdir(exist_ok=True)
        share(path)


def share(path: Path) -> None:
    """What is made in a folder of a group (setgid, and the group may write) is the group's, whatever the umask says."""
    above = path.parent.stat().st_mode
    if above & stat.S_ISGID and above & stat.S_IWGRP:
        ours = path.stat().st_mode
        path.chmod(stat.S_IMODE(ours) | (above & 0o2070 if stat.S_ISDIR(ours) else 0o060))


def write(path: Path, data: bytes) -> None:
    """Write a file so that a crash leaves the old content or the new, never half of it.

    Raises Unavailable when the disk is full.
    """
    with room(path):
        make(path.parent)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            share(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync(path.parent)


def sync(path: Path) -> None:
    """Ask the kernel to put a file or a folder's entries on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
