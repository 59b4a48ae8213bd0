"""The gallery: who is known, by the vectors of their faces; durable, searchable, and shared by any number of processes.

Every process that opens the folder may read and write it: writers take turns by a file lock, readers follow the log.
An enrolment is acknowledged when its record is on disk. What is forgotten is gone from disk after `compact`.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock, RLock
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from torchship.errors import BadInput, Denied, NotFound
from torchship_faces.gallery import pictures, records, snapshot
from torchship_faces.gallery.finder import EXACT_BELOW, Finder, Hit
from torchship_faces.gallery.records import Forget, Put, Record, Template
from torchship_faces.gallery.state import Person, State

_PERSON = re.compile(r"[\w][\w .@+\-]{0,199}")
_T = TypeVar("_T")
_LOG_FLOOR = 64 << 20


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
        self._exact_below, self._threads = exact_below, threads
        self._state_lock, self._writer_lock = RLock(), Lock()
        if create:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        elif not (self.root / snapshot.MANIFEST).exists():
            snapshot.read_manifest(self.root)
        self._turn = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._log = -1
        self._finder: Finder | None = None
        try:
            with self._exclusive():
                if not (self.root / snapshot.MANIFEST).exists():
                    snapshot.begin(self.root, model=model, width=width)
                self._reload()
                snapshot.sweep(self.root, self._manifest)
            self._check_model(model, width)
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
            manifest = snapshot.read_manifest(self.root)
            try:
                log = os.open(self.root / manifest.log, os.O_RDWR | os.O_CLOEXEC)
                state, packed = snapshot.load(self.root, manifest)
                break
            except FileNotFoundError:  # another process has just moved on to a newer snapshot
                if attempt == 19:
                    raise
                time.sleep(0.01)
        records.check(os.pread(log, records.HEAD, 0), path=self.root / manifest.log)
        finder = Finder(state, exact_below=self._exact_below, threads=self._threads, packed=packed)
        self._take_over(finder, manifest, log)
        self._follow()

    def _take_over(self, finder: Finder, manifest: snapshot.Manifest, log: int) -> None:
        old_log = self._log
        self._finder, self._manifest, self._log, self._end = finder, manifest, log, records.HEAD
        self._seen = self._stamp()  # the old index is not closed: a search may still be using it
        if old_log >= 0:
            os.close(old_log)

    def _stamp(self) -> tuple[int, int]:
        found = os.stat(self.root / snapshot.MANIFEST)
        return found.st_ino, found.st_mtime_ns

    def _current(self) -> Finder:
        """The index, after taking in what other processes wrote."""
        with self._state_lock:
            if self._finder is None:
                raise NotFound(f"the gallery {self.root} is closed")
            if self._stamp() != self._seen:
                self._reload()
            elif os.fstat(self._log).st_size > self._end:
                self._follow()
            return self._finder

    def _follow(self) -> None:
        found = list(records.read(self._log, start=self._end, path=self.root / self._manifest.log))
        if found:
            self._apply([record for record, _ in found])
            self._end = found[-1][1]

    def _apply(self, written: Sequence[Record]) -> None:
        assert self._finder is not None  # noqa: S101  # callers hold an open gallery
        added = sum(self._finder.state.apply(record) for record in written)
        if added:
            self._finder.add(added)

    # -- writing

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        with self._writer_lock:
            fcntl.flock(self._turn, fcntl.LOCK_EX)
            try:
                yield
            finally:
                if self._turn >= 0:
                    fcntl.flock(self._turn, fcntl.LOCK_UN)

    def _append(self, written: Sequence[Record]) -> None:
        """The caller holds the turn and is up to date: whatever lies behind the known end is a torn tail."""
        if os.fstat(self._log).st_size > self._end:
            os.ftruncate(self._log, self._end)
        end = records.append(self._log, written, at=self._end)
        with self._state_lock:
            self._apply(written)
            self._end = end

    def enrol(self, enrolments: Sequence[Enrolment]) -> list[list[int]]:
        """Add templates; on disk when this returns. The numbers of the new templates, for each enrolment.

        Raises BadInput for vectors that are empty, of another width or not finite, and for odd names;
        Unavailable when the disk refuses. All enrolments of a call are taken, or none.
        """
        units = [_unit(item, self.width) for item in enrolments]
        with self._exclusive():
            serial = self._current().state.next_serial
            kept = [[pictures.keep(self.root, face) for face in item.faces] for item in enrolments]
            puts = []
            for item, vectors, faces in zip(enrolments, units, kept, strict=True):
                templates = tuple(
                    Template(serial + row, vector.tobytes(), _at(item.qualities, row, 0.0), _at(faces, row, b""))
                    for row, vector in enumerate(vectors)
                )
                serial += len(templates)
                puts.append(Put(item.person, templates, item.groups, item.about, item.replace, time.time()))
            self._append(puts)
            self._compact_if_due()
        return [[template.serial for template in put.templates] for put in puts]

    def forget(self, person: str, *, serial: int = 0) -> int:
        """Drop a person, or one template; on disk when this returns. How many templates went.

        Raises NotFound. `compact` then removes the vectors from the disk; a kept face is removed at once.
        """
        with self._exclusive():
            state = self._current().state
            rows = state.rows_of(person)
            if serial:
                rows = rows[state.serial.take(rows) == serial]
            if person not in state.people.number or (serial and not len(rows)):
                raise NotFound(f"the gallery holds no {f'template {serial} of ' if serial else ''}person {person!r}")
            digests = [
                state.pictures[number] for number in state.serial.take(rows).tolist() if number in state.pictures
            ]
            self._append([Forget(person, serial, time.time())])
            still = set(state.pictures.values())
            pictures.remove(self.root, [digest for digest in digests if digest not in still])
            self._compact_if_due()
            return len(rows)

    def compact(self) -> None:
        """Write a snapshot of the living rows and start an empty log: the forgotten are gone from disk."""
        with self._exclusive():
            self._current()
            self._compact()

    def _compact_if_due(self) -> None:
        assert self._finder is not None  # noqa: S101
        state = self._finder.state
        rows_on_disk = self._manifest.rows * self._manifest.width * 2
        if self._end > max(_LOG_FLOOR, rows_on_disk // 2) or state.dead > max(10_000, len(state.alive) // 5):
            self._compact()

    def _compact(self) -> None:
        """Searches go on with the old state meanwhile; other writers wait."""
        assert self._finder is not None  # noqa: S101
        old = self._finder
        writer = snapshot.Writer(self.root)
        state = writer.vectors(old.state)
        packed = b"" if old.state.dead else old.packed()
        finder = Finder(state, exact_below=self._exact_below, threads=self._threads, packed=packed)
        manifest = writer.publish(state, packed=finder.packed(), model=self._manifest.model)
        pictures.sweep(self.root, set(state.pictures.values()))
        with self._state_lock:
            self._take_over(finder, manifest, os.open(self.root / manifest.log, os.O_RDWR | os.O_CLOEXEC))

    # -- reading

    def nearest(
        self, vectors: NDArray[np.float32], *, count: int = 1, group: str = "", exact: bool = False, effort: int = 256
    ) -> list[list[Hit]]:
        """For each vector (n, width) the `count` most similar persons (cosine), best first. Raises BadInput."""
        unit = _checked(np.asarray(vectors, np.float32), self.width)
        return self._current().nearest(unit, count=count, group=group, exact=exact, effort=effort)

    def person(self, person: str) -> Person:
        """Raises NotFound."""
        state = self._current().state
        if person not in state.people.number:
            raise NotFound(f"the gallery holds no person {person!r}")
        return state.about(person, state.rows_of(person))

    def still(self) -> State:
        """What the gallery holds now, for reading all of it: its rows stay where they are, whatever happens after."""
        return self._current().state

    def page(self, *, after: str = "", limit: int = 100, group: str = "") -> list[str]:
        """Up to `limit` persons in the order they came, behind `after`. Raises NotFound for an unknown `after`."""
        people = self._current().state.people
        if after and after not in people.number:
            raise NotFound(f"the gallery holds no person {after!r}", hint="begin again at the first page")
        found: list[str] = []
        members = people.members(group) if group else None
        for number in people.after(people.number[after] if after else -1):
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
        """The vectors of a person, shape (n, width)."""
        state = self.still()
        return state.vectors.take(state.rows_of(person)).astype(np.float32)

    def faces_of(self, person: str) -> dict[int, bytes]:
        """The kept faces (JPEG) of a person by template number."""
        state = self.still()
        serials = state.serial.take(state.rows_of(person)).tolist()
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


def _unit(item: Enrolment, width: int) -> NDArray[np.float16]:
    if not _PERSON.fullmatch(item.person):
        raise BadInput(
            f"{item.person!r} cannot be the name of a person",
            hint="use 1 to 200 letters, digits, spaces and . _ @ + -, beginning with a letter or digit",
        )
    if not all(_PERSON.fullmatch(group) for group in item.groups):
        raise BadInput(f"odd group name in {list(item.groups)}", hint="group names follow the rules of person names")
    return _checked(np.asarray(item.vectors, np.float32), width).astype("<f2")


def _at(values: Sequence[_T], row: int, default: _T) -> _T:
    return values[row] if row < len(values) else default
