"""The store: a folder of named artifacts in versions 1, 2, 3 ..., one of which is current."""

from __future__ import annotations

import difflib
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path

import msgspec

from torchship import home
from torchship.artifact import folder as folders
from torchship.artifact.folder import MANIFEST
from torchship.artifact.opening import open_artifact
from torchship.errors import BadConfig, NotFound, Unavailable

_NAME = re.compile(r"[A-Za-z][\w.-]{0,99}", re.ASCII)
_STATE = "state.json"
_FORGOTTEN_S = 86_400


class _State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the store remembers of a name: numbers are never used twice."""

    current: int = 0
    latest: int = 0


class Entry(msgspec.Struct, frozen=True):
    """One published name: its versions in rising order, and the one that `name` alone means."""

    name: str
    versions: tuple[int, ...]
    current: int


def check_name(name: str) -> str:
    """`name` when it is one: a letter, then letters, digits, `_`, `.` and `-`. Raises BadConfig."""
    if not _NAME.fullmatch(name):
        raise BadConfig(
            f"{name!r} is not a name", hint="use a letter, then letters, digits, _ . - (at most 100 in all)"
        )
    return name


class Store:
    """Artifacts below `root`, else `$TORCHSHIP_STORE`, else `~/.local/share/torchship/store`.

    Several processes may publish, read and remove at once.
    """

    def __init__(self, root: Path | str | None = None) -> None:
        self.named = str(root or "")  # what was given; empty for the user's own

    @cached_property
    def root(self) -> Path:
        """Its folder. Raises BadConfig where none is given and there is no usable home.

        That is found out when it is asked for: artifacts that are named by their folders need no store.
        """
        if self.named:
            return home.expand(self.named)
        return home.folder("TORCHSHIP_STORE", ".local", "share", "torchship", "store")

    def publish(self, folder: Path | str, *, name: str, current: bool = True) -> int:
        """Copy the artifact in `folder` into the store as the next version of `name`, and make it current if asked.

        The copy is verified before it appears; a crash leaves nothing that `list` shows.
        """
        check_name(name)
        open_artifact(folder, verify=False)
        with folders.room(self.root), self._incoming() as staged:
            _copy(Path(folder), staged)
            open_artifact(staged)
            with self._locked(name) as home:
                state = self._state(name)
                version = max([state.latest, *self.versions(name)]) + 1
                while True:
                    try:
                        os.rename(staged, home / str(version))
                        break
                    except OSError as fault:  # taken, where the file system knows no locks
                        if fault.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                            raise
                        version += 1
                folders.sync(home)
                self._remember(name, _State(version if current else state.current or version, version))
        return version

    def resolve(self, target: str) -> Path:
        """The folder of `name`, `name@current`, `name@latest` or `name@3`; or `target` itself when it is a path.

        Raises NotFound with near names, BadConfig for a target that is neither.
        """
        if "/" in target or target in (".", ".."):
            path = home.expand(target)
            if not path.is_dir():
                raise NotFound(f"no artifact at {target}", hint="`torchship store list` shows what is published")
            return path
        name, _, wanted = target.partition("@")
        check_name(name)
        versions = self.versions(name)
        if not versions:
            if not wanted and (Path(target) / MANIFEST).is_file():
                return Path(target)
            raise self._unknown(name)
        return self.root / name / str(self._version(name, wanted or "current", versions))

    def list(self) -> tuple[Entry, ...]:
        """What is published, sorted by name."""
        try:
            with folders.room(self.root, verb="read"):
                names = sorted(path.name for path in self.root.iterdir() if _NAME.fullmatch(path.name))
        except FileNotFoundError:
            return ()
        entries = []
        for name in names:
            with suppress(Unavailable):  # someone else's, not for us
                entries.append(Entry(name, self.versions(name), self._state(name).current))
        return tuple(entry for entry in entries if entry.versions)

    def versions(self, name: str) -> tuple[int, ...]:
        """The versions of `name` in rising order; none when it is not published."""
        try:
            with folders.room(self.root / name, verb="read"):
                found = [path.name for path in (self.root / check_name(name)).iterdir()]
        except (FileNotFoundError, NotADirectoryError):
            return ()
        return tuple(
            sorted(int(text) for text in found if text.isascii() and text.isdigit() and text == str(int(text)))
        )

    def current(self, name: str) -> int:
        """The version that `name` alone means. Raises NotFound."""
        return int(self.resolve(f"{check_name(name)}@current").name)

    def set_current(self, name: str, *, version: int) -> None:
        """Make `version` the one that `name` alone means. Raises NotFound."""
        self.resolve(f"{check_name(name)}@{version}")
        with folders.room(self.root), self._locked(name):
            self._version(name, str(version), self.versions(name))
            self._remember(name, _State(version, self._state(name).latest))

    def remove(self, name: str, *, version: int | None = None) -> None:
        """Remove one version, or all. The number is not used again; `current` moves to the newest that is left.

        Raises NotFound.
        """
        versions = self.versions(name)
        if not versions:
            raise self._unknown(name)
        with folders.room(self.root), self._incoming() as trash, self._locked(name) as home:
            versions = self.versions(name)
            gone = versions if version is None else (self._version(name, str(version), versions),)
            state = self._state(name)
            left = [number for number in versions if number not in gone]
            current = state.current if state.current in left else max(left, default=0)
            self._remember(name, _State(current, max([state.latest, *versions])))
            for number in gone:
                os.rename(home / str(number), trash / str(number))

    def _version(self, name: str, wanted: str, versions: tuple[int, ...]) -> int:
        if wanted == "latest":
            return versions[-1]
        if wanted == "current":
            current = self._state(name).current
            return current if current in versions else versions[-1]
        if not (wanted.isascii() and wanted.isdigit()):
            raise BadConfig(f"{name}@{wanted}: not a version", hint="use a number, `current` or `latest`")
        if int(wanted) not in versions:
            raise NotFound(f"{name} has no version {wanted}", hint=f"it has {', '.join(map(str, versions)) or 'none'}")
        return int(wanted)

    def _unknown(self, name: str) -> NotFound:
        names = [entry.name for entry in self.list()]
        near = difflib.get_close_matches(name, names, 3) or names[:5]
        hint = f"there is {', '.join(near)}" if near else "publish it with `torchship optimize ... --name`"
        return NotFound(f"the store at {self.root} has no {name!r}", hint=hint)

    def _state(self, name: str) -> _State:
        """What is remembered of a name; nothing where that was lost: then the newest version is current."""
        try:
            with folders.room(self.root / name, verb="read"):
                return msgspec.json.decode((self.root / name / _STATE).read_bytes(), type=_State)
        except (FileNotFoundError, NotADirectoryError, msgspec.MsgspecError):
            return _State()

    def _remember(self, name: str, state: _State) -> None:
        folders.write(self.root / name / _STATE, msgspec.json.encode(state))

    @contextmanager
    def _locked(self, name: str) -> Iterator[Path]:
        """Only one process at a time changes what lies under a name."""
        home = self.root / name
        folders.make(home)
        plain = os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            descriptor = os.open(home / ".lock", os.O_RDWR | os.O_CREAT | plain, 0o666)
        except PermissionError:  # another one's: reading is enough to lock it
            descriptor = os.open(home / ".lock", os.O_RDONLY | plain)
        try:
            with suppress(PermissionError):
                folders.share(home / ".lock")
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError as fault:  # a file system without locks: `publish` finds a free number by itself
                if fault.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
            yield home
        finally:
            os.close(descriptor)

    @contextmanager
    def _incoming(self) -> Iterator[Path]:
        """A private place on the same disk, gone afterwards unless it was renamed away."""
        place = self.root / ".incoming" / f"{os.getpid()}-{os.urandom(6).hex()}"
        folders.make(place)
        _sweep(place.parent, now=place.stat().st_mtime)
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)


def _sweep(incoming: Path, *, now: float) -> None:
    """Remove what publishers that were killed left behind; `now` by the clock of the disk, which may not be ours."""
    for place in incoming.iterdir():
        try:
            if place.stat().st_mtime < now - _FORGOTTEN_S:
                shutil.rmtree(place, ignore_errors=True)
        except FileNotFoundError:
            continue


def _copy(source: Path, target: Path) -> None:
    for path in folders.files_below(source):
        there = target / folders.check_path(path)
        folders.make(there.parent)
        with os.fdopen(folders.open_file(source, path), "rb") as given, open(there, "xb") as taken:
            shutil.copyfileobj(given, taken, 2**20)
            taken.flush()
            os.fsync(taken.fileno())
        folders.share(there)
    for place, _, _ in os.walk(target):
        folders.sync(Path(place))
