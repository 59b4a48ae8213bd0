"""The gallery: who is known, by the vectors of their faces; durable, searchable, and shared by any number of processes.

Every process that opens the folder may read and write it: writers take turns by a file lock, readers follow the log.
An enrolment is acknowledged when its record is on disk. What is forgotten is gone from disk after `compact`.
A backup may be copied over the folder while it is open: who holds it notices, and reads anew.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock, RLock
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from torchship.errors import BadInput, CorruptArtifact, Denied, NotFound, Unavailable
from torchship_faces.gallery import names, pictures, records, snapshot
from torchship_faces.gallery.finder import EXACT_BELOW, Finder, Hit
from torchship_faces.gallery.records import ForgetRecord, Put, Record, Template
from torchship_faces.gallery.state import Person, Rows, State

_T = TypeVar("_T")
_LOG_FLOOR = 64 << 20
_ROOM_AGAIN = 60.0  # seconds until a compaction that found no room is tried again
_log = logging.getLogger("torchship")


@dataclass(frozen=True, kw_only=True)
class Enrolment:
    """What is to be known of a person: vectors (n, width) FP32, and per vector a quality and the kept face (JPEG)."""

    person: str
    vectors: NDArray[np.float32]
    groups: tuple[str, ...] = ()
    about: dict[str, str] = field(default_factory=dict)
    qualities: Sequence[float] = ()
    faces: Sequence[bytes] = ()
    replace: bool = False


class Gallery:
    """An open gallery. All methods may be called from any thread."""

    def __init__(
        self,
        root: str | Path,
        *,
        model: str,
        width: int = 512,
        create: bool = True,
        exact_below: int = EXACT_BELOW,
        threads: int = 2,
    ) -> None:
        """Open the folder `root`, or make it. `model` is the hash of the embedding model.

        Raises NotFound, CorruptArtifact, and Denied when the gallery holds vectors of another model.
        """
        self.root = Path(root)
        self._turn = self._log = -1
        self._compact_at = 0.0
        self._exact_below, self._threads = exact_below, threads
        self._state_lock, self._writer_lock = RLock(), Lock()
        self._finder: Finder | None = None
        try:
            if create:
                self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            elif not (self.root / snapshot.MANIFEST).exists():
                snapshot.read_manifest(self.root)
            with self._exclusive():
                if not (self.root / snapshot.MANIFEST).exists():
                    snapshot.begin(self.root, model=model, width=width)
                self._reload()
                snapshot.sweep(self.root, self._manifest)
            self._check_model(model, width)
        except OSError as fault:
            self.close()
            raise Unavailable(
                f"the gallery {self.root} cannot be opened: {fault.strerror}",
                hint="look at the rights and the disk",
            ) from None
        except BaseException:
            self.close()
            raise

    def _check_model(self, model: str, width: int) -> None:
        if self._manifest.model != model or self._manifest.width != width:
            raise Denied(
                f"the gallery {self.root} holds vectors of model {self._manifest.model} ({self._manifest.width}-d), "
                f"not of {model} ({width}-d)",
                hint="vectors of two models cannot be compared: `torchship faces re-embed` migrates the gallery",
            )

    @property
    def model(self) -> str:
        """The hash of the embedding model whose vectors are held."""
        return self._manifest.model

    @property
    def width(self) -> int:
        """The length of a vector."""
        return self._manifest.width

    def close(self) -> None:
        """Give files and threads back. May be called twice."""
        finder, self._finder = self._finder, None
        if finder is not None:
            finder.close()
        for name in ("_log", "_turn"):
            handle = getattr(self, name)
            setattr(self, name, -1)
            if handle >= 0:
                os.close(handle)

    # -- following the files

    def _reload(self) -> None:
        for attempt in range(20):
            log = -1
            try:
                seen, manifest = self._stamp(), snapshot.read_manifest(self.root)
                log = os.open(self.root / manifest.log, os.O_RDWR | os.O_CLOEXEC)
                records.check(os.pread(log, records.HEAD, 0), path=self.root / manifest.log)
                state, packed = snapshot.load(self.root, manifest)
                break
            except (FileNotFoundError, CorruptArtifact) as fault:  # a newer snapshot, or a backup, is just taking over
                if log >= 0:
                    os.close(log)
                if attempt < 19:
                    time.sleep(0.01)
                elif isinstance(fault, CorruptArtifact):
                    raise
                else:
                    raise CorruptArtifact(
                        f"{self.root}: {Path(fault.filename).name} is missing", hint="restore it from an export"
                    ) from None
        finder = Finder(state, exact_below=self._exact_below, threads=self._threads, packed=packed)
        self._take_over(finder, manifest, log, seen)
        self._follow()

    def _take_over(self, finder: Finder, manifest: snapshot.GalleryManifest, log: int, seen: tuple[int, int]) -> None:
        old_log = self._log
        self._finder, self._manifest, self._log = finder, manifest, log
        self._begin, self._end = 0, records.HEAD  # where the last thing that was read of the log begins, and ends
        self._mark = os.pread(log, records.HEAD, 0)
        self._log_seen = self._log_stamp()
        self._seen = seen  # the old index is not closed: a search may still be using it
        if old_log >= 0:
            os.close(old_log)

    def _stamp(self) -> tuple[int, int]:
        found = os.stat(self.root / snapshot.MANIFEST)
        return found.st_ino, found.st_mtime_ns

    def _log_stamp(self) -> tuple[int, int, int]:
        found = os.stat(self.root / self._manifest.log)
        return found.st_ino, found.st_size, found.st_ctime_ns

    def _current(self) -> Finder:
        """The index, after taking in what other processes wrote, or what a backup put in their place."""
        with self._state_lock:
            if self._finder is None:
                raise NotFound(f"the gallery {self.root} is closed")
            try:
                if self._stamp() != self._seen:
                    self._reload()
                elif (found := self._log_stamp()) != self._log_seen:
                    if self._was_replaced():
                        self._reload()
                    else:
                        self._log_seen = found
                        self._follow()
            except FileNotFoundError:  # in the middle of a restore
                self._reload()
            return self._finder

    def _was_replaced(self) -> bool:
        """Whether the log is another one than the one that was read: elsewhere, or with another record at its end."""
        here = os.fstat(self._log)
        there = os.stat(self.root / self._manifest.log)
        same = (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino) and here.st_size >= self._end
        return not same or os.pread(self._log, len(self._mark), self._begin) != self._mark

    def _follow(self) -> None:
        found = list(records.read(self._log, start=self._end, path=self.root / self._manifest.log))
        if found:
            self._apply([record for record, _ in found])
            ends = [self._end, *(end for _, end in found)]
            self._remember(ends[-2], ends[-1])

    def _remember(self, begin: int, end: int) -> None:
        self._begin, self._end = begin, end
        self._mark = os.pread(self._log, records.FRAME, begin)

    def _apply(self, written: Sequence[Record]) -> None:
        assert self._finder is not None  # noqa: S101  # callers hold an open gallery
        added = sum(self._finder.state.apply(record) for record in written)
        if added:
            self._finder.add(added)

    # -- writing

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        with self._writer_lock:
            self._take_turn()
            try:
                yield
            finally:
                if self._turn >= 0:
                    fcntl.flock(self._turn, fcntl.LOCK_UN)

    def _take_turn(self) -> None:
        """Lock the lock file that is there now: a restore may have put another in its place."""
        path = self.root / "lock"
        while True:
            if self._turn < 0:
                self._turn = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._turn, fcntl.LOCK_EX)
            held = os.fstat(self._turn)
            try:
                there = os.stat(path)
            except FileNotFoundError:
                there = None
            if there is not None and (held.st_dev, held.st_ino) == (there.st_dev, there.st_ino):
                return
            os.close(self._turn)
            self._turn = -1

    def _append(self, written: Sequence[Record]) -> None:
        """The caller holds the turn and is up to date: whatever lies behind the known end is a torn tail."""
        at = self._end
        if os.fstat(self._log).st_size > at:
            os.ftruncate(self._log, at)
        begin, end = records.append(self._log, written, at=at)
        with self._state_lock:
            if self._end == at:
                self._apply(written)
                self._remember(begin, end)
            else:
                self._follow()  # a search in another thread has read some of it already
            self._log_seen = self._log_stamp()

    def enrol(self, enrolments: Sequence[Enrolment]) -> list[list[int]]:
        """Add templates; on disk when this returns. The numbers of the new templates, for each enrolment.

        Raises BadInput for vectors that are empty, of another width or not finite, and for odd names;
        Unavailable when the disk refuses. All enrolments of a call are taken, or none.
        """
        units = [_checked(np.asarray(item.vectors, np.float32), self.width).astype("<f2") for item in enrolments]
        called = [(names.checked_person(item.person), names.checked_groups(item.groups)) for item in enrolments]
        with self._exclusive():
            state = self._current().state
            serial = state.next_serial
            kept: list[list[bytes]] = []
            puts = []
            dropped: set[bytes] = set()
            try:
                for item in enrolments:
                    kept.append([])
                    for face in item.faces:
                        kept[-1].append(pictures.keep(self.root, face))
                for item, (person, groups), vectors, faces in zip(enrolments, called, units, kept, strict=True):
                    templates = tuple(
                        Template(serial + row, vector.tobytes(), _at(item.qualities, row, 0.0), _at(faces, row, b""))
                        for row, vector in enumerate(vectors)
                    )
                    serial += len(templates)
                    known = state.people.find(item.person) or person
                    puts.append(Put(known, templates, groups, item.about, item.replace, time.time()))
                    if item.replace:
                        dropped |= _faces(state, state.rows_of(known))
                self._append(puts)
            except BaseException:
                new = {digest for faces in kept for digest in faces if digest}
                pictures.remove(self.root, new.difference(state.pictures.values()))
                raise
            pictures.remove(self.root, dropped.difference(self._current().state.pictures.values() if dropped else ()))
            self._compact_if_due()
        return [[template.serial for template in put.templates] for put in puts]

    def forget(self, person: str, *, serial: int | None = None, compact: bool = False) -> int:
        """Drop a person, or one template; on disk when this returns. How many templates went.

        A kept face is removed at once, the vectors by `compact`. Raises NotFound, and Unavailable when the disk refuses
        the record, or has no room to compact: that says that the person is forgotten all the same.
        """
        with self._exclusive():
            state = self._current().state
            known = self._known(state, person)
            rows = state.rows_of(known)
            if serial is not None:
                rows = rows[[number == serial for number in state.serial.take(rows).tolist()]]
                if not len(rows):
                    raise NotFound(f"the gallery holds no template {serial} of person {person!r}")
            digests = _faces(state, rows)
            self._append([ForgetRecord(known, serial or 0, time.time())])
            pictures.remove(self.root, digests.difference(self._current().state.pictures.values()))
            if not compact:
                self._compact_if_due()
                return len(rows)
            try:
                self._compact()
            except Unavailable as fault:
                hint = "make room and compact; nobody is found by them"
                raise Unavailable(
                    f"{person!r} is forgotten, the vectors are on disk still: {fault}", hint=hint
                ) from None
            return len(rows)

    def compact(self) -> None:
        """Write a snapshot of the living rows and start an empty log: the forgotten are gone from disk.

        Raises Unavailable when the disk has no room for it; everything is then as it was.
        """
        with self._exclusive():
            self._current()
            self._compact()

    def _compact_if_due(self) -> None:
        """What was just written is on disk: that there is no room for a snapshot now is no fault of it."""
        assert self._finder is not None  # noqa: S101
        state = self._finder.state
        rows_on_disk = self._manifest.rows * self._manifest.width * 2
        due = self._end > max(_LOG_FLOOR, rows_on_disk // 2) or state.dead > max(10_000, len(state.alive) // 5)
        if not due or time.monotonic() < self._compact_at:
            return
        try:
            self._compact()
        except Unavailable as fault:
            self._compact_at = time.monotonic() + _ROOM_AGAIN
            _log.warning("%s; its log goes on growing meanwhile", fault)

    def _compact(self) -> None:
        """Searches go on with the old state meanwhile; other writers wait."""
        assert self._finder is not None  # noqa: S101
        old = self._finder
        finder = None
        try:
            writer = snapshot.Writer(self.root)
            state = writer.vectors(old.state)
            packed = b"" if old.state.dead else old.packed()
            finder = Finder(state, exact_below=self._exact_below, threads=self._threads, packed=packed)
            manifest = writer.publish(state, packed=finder.packed(), model=self._manifest.model)
            log = os.open(self.root / manifest.log, os.O_RDWR | os.O_CLOEXEC)
        except OSError as fault:
            if finder is not None:
                finder.close()
            snapshot.sweep(self.root, snapshot.read_manifest(self.root))
            raise Unavailable(
                f"the gallery {self.root} could not be compacted: {fault.strerror}",
                hint="nothing is lost; make room and try again",
            ) from None
        with self._state_lock:
            self._take_over(finder, manifest, log, self._stamp())
        pictures.sweep(self.root, set(state.pictures.values()))

    # -- reading

    def nearest(
        self, vectors: NDArray[np.float32], *, count: int = 1, group: str = "", exact: bool = False, effort: int = 256
    ) -> list[list[Hit]]:
        """For each vector (n, width) the `count` most similar persons (cosine), best first. Raises BadInput."""
        unit = _checked(np.asarray(vectors, np.float32), self.width)
        group = names.composed(group)
        return self._current().nearest(unit, count=count, group=group, exact=exact, effort=effort)

    def person(self, person: str) -> Person:
        """Raises NotFound."""
        state = self._current().state
        known = self._known(state, person)
        return state.about(known, state.rows_of(known))

    @staticmethod
    def _known(state: State, person: str) -> str:
        """The name under which a person is kept. Raises NotFound."""
        found = state.people.find(person)
        if found is None:
            raise NotFound(f"the gallery holds no person {person!r}")
        return found

    def still(self) -> State:
        """What the gallery holds now, for reading all of it: its rows stay where they are, whatever happens after."""
        return self._current().state

    def page(self, *, after: str = "", limit: int = 100, group: str = "") -> list[str]:
        """Up to `limit` persons in the order they came, behind `after`. Raises NotFound for an unknown `after`."""
        people = self._current().state.people
        last = people.find(after)
        if after and last is None:
            raise NotFound(f"the gallery holds no person {after!r}", hint="begin again at the first page")
        found: list[str] = []
        members = people.members(names.composed(group)) if group else None
        for number in people.after(-1 if last is None else people.number[last]):
            if members is None or (number < len(members) and members[number]):
                found.append(people.ids[number])
            if len(found) == limit:
                break
        return found

    def count(self) -> tuple[int, int]:
        """How many persons and how many templates."""
        state = self._current().state
        return len(state.people.number), len(state)

    def vectors_of(self, person: str) -> NDArray[np.float32]:
        """The vectors of a person, shape (n, width); none for one who is not there."""
        state = self.still()
        return state.vectors.take(state.rows_of(state.people.find(person) or "")).astype(np.float32)

    def faces_of(self, person: str) -> dict[int, bytes]:
        """The kept faces (JPEG) of a person by template number."""
        state = self.still()
        serials = state.serial.take(state.rows_of(state.people.find(person) or "")).tolist()
        return {n: pictures.read(self.root, state.pictures[n]) for n in serials if n in state.pictures}

    def recall(self, *, queries: int = 200, similarity: float = 0.6, effort: int = 256, seed: int = 0) -> float:
        """The share of noisy copies of enrolled vectors (cosine `similarity`) whose nearest person is the same by the
        short list as by comparing every row. 1.0 for an empty gallery."""
        state = self._current().state
        living = np.flatnonzero(state.alive.whole())
        if not len(living):
            return 1.0
        random = np.random.default_rng(seed)
        rows = random.choice(living, min(queries, len(living)), replace=False)
        noisy = noisy_copies(state.vectors.take(rows).astype(np.float32), similarity=similarity, random=random)
        fast = self.nearest(noisy, effort=effort)
        exact = self.nearest(noisy, exact=True)
        return sum(a[0].person == b[0].person for a, b in zip(fast, exact, strict=True)) / len(rows)


def noisy_copies(
    vectors: NDArray[np.float32], *, similarity: float, random: np.random.Generator
) -> NDArray[np.float32]:
    """Unit vectors in random directions at cosine `similarity` from the given ones."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    away = random.standard_normal(unit.shape, dtype=np.float32)
    away -= (away * unit).sum(1, keepdims=True) * unit
    away /= np.linalg.norm(away, axis=1, keepdims=True)
    copies: NDArray[np.float32] = np.float32(similarity) * unit + np.float32(np.sqrt(1 - similarity**2)) * away
    return copies


def _checked(vectors: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    if vectors.ndim != 2 or vectors.shape[1] != width:
        raise BadInput(f"vectors have shape {list(vectors.shape)}, expected [n, {width}]")
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not (np.isfinite(norms).all() and (norms > 1e-6).all()):
        raise BadInput("a vector is zero or not finite", hint="embed a picture that shows a face")
    unit: NDArray[np.float32] = vectors / norms
    return unit


def _faces(state: State, rows: Rows) -> set[bytes]:
    """The digests of the faces that are kept for these rows."""
    serials = state.serial.take(rows).tolist()
    return {state.pictures[serial] for serial in serials if serial in state.pictures}


def _at(values: Sequence[_T], row: int, default: _T) -> _T:
    return values[row] if row < len(values) else default
