"""What a gallery holds in memory: people, their groups, and one row for every template.

Columns grow at the end while others read them: readers keep the array they took, rows never move.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchship_faces.gallery import names
from torchship_faces.gallery.records import ForgetRecord, Record, Template

Rows = NDArray[np.int64]


class Column:
    """A growing array of rows over an unchanging first part (a memory-mapped file, say)."""

    def __init__(self, kind: type[np.generic], *, width: int = 0, first: NDArray[Any] | None = None) -> None:
        """`width` 0 is one value a row; `first` holds the rows that are there already."""
        shape = (0, width) if width else (0,)
        self._first: NDArray[Any] = np.empty(shape, kind) if first is None else first
        self._rest: NDArray[Any] = np.empty((64, *shape[1:]), kind)
        self._count = 0

    def __len__(self) -> int:
        return len(self._first) + self._count

    def append(self, rows: Sequence[Any] | NDArray[Any]) -> None:
        """Add rows. A reader in another thread sees them when its next `view` or `take` begins."""
        new = np.asarray(rows, self._rest.dtype)
        wanted = self._count + len(new)
        if wanted > len(self._rest):
            grown = np.empty((max(wanted, 2 * len(self._rest)), *self._rest.shape[1:]), self._rest.dtype)
            grown[: self._count] = self._rest[: self._count]
            self._rest = grown
        self._rest[self._count : wanted] = new
        self._count = wanted

    def parts(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """The unchanging part and the grown one, as views."""
        count = self._count
        return self._first, self._rest[:count]

    def take(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """The rows of these numbers, as a copy in memory."""
        first, rest = self.parts()
        if not len(rest) or (len(rows) and rows.max() < len(first)):
            return np.asarray(first[rows])
        if not len(first):
            return np.asarray(rest[rows])
        inside = rows < len(first)
        out = np.empty((len(rows), *rest.shape[1:]), rest.dtype)
        out[inside] = first[rows[inside]]
        out[~inside] = rest[rows[~inside] - len(first)]
        return out

    def slice(self, start: int, end: int) -> NDArray[Any]:
        """Rows `start` to `end`; a view where they lie in one part."""
        first, rest = self.parts()
        border = len(first)
        if end <= border:
            return first[start:end]
        if start >= border:
            return rest[start - border : end - border]
        return np.concatenate([first[start:], rest[: end - border]])

    def whole(self) -> NDArray[Any]:
        """All rows as one array."""
        return self.slice(0, len(self))

    def put(self, rows: NDArray[np.int64], value: Any) -> None:
        """Set rows in place (the first part must be in memory, not mapped read-only)."""
        first, rest = self.parts()
        first[rows[rows < len(first)]] = value
        rest[rows[rows >= len(first)] - len(first)] = value


class People:
    """Persons by number, in the order they came; a number is never used twice."""

    def __init__(self) -> None:
        self.ids: list[str] = []  # "" once forgotten
        self.number: dict[str, int] = {}
        self.group_sets: list[tuple[str, ...]] = [()]
        self.about: dict[int, dict[str, str]] = {}
        self._set_number: dict[tuple[str, ...], int] = {(): 0}
        self._set = Column(np.int32)

    def find(self, person: str) -> str | None:
        """The name under which a person is known, whether asked for composed or decomposed."""
        return next((name for name in (person, names.composed(person)) if name in self.number), None)

    def meet(self, person: str) -> int:
        """The number of a person, a new one when unknown."""
        known = self.number.get(person)
        if known is not None:
            return known
        self.number[person] = len(self.ids)
        self.ids.append(person)
        self._set.append([0])
        return len(self.ids) - 1

    def join(self, number: int, groups: tuple[str, ...]) -> None:
        """Set the groups of a person."""
        chosen = tuple(sorted(set(groups)))
        if chosen not in self._set_number:
            self._set_number[chosen] = len(self.group_sets)
            self.group_sets.append(chosen)
        self._set.put(np.array([number]), self._set_number[chosen])

    def groups(self, number: int) -> tuple[str, ...]:
        """The groups of a person."""
        return self.group_sets[int(self._set.take(np.array([number]))[0])]

    def members(self, group: str) -> NDArray[np.bool_]:
        """For every person's number, whether that person is in `group`."""
        sets = np.array([group in names for names in self.group_sets])
        found: NDArray[np.bool_] = sets[self._set.whole()]
        return found

    def set_numbers(self) -> NDArray[np.int32]:
        """For every person's number, the number of its group set."""
        return self._set.whole().astype("<i4")

    def restore_groups(self, group_sets: list[tuple[str, ...]], numbers: NDArray[np.int32]) -> None:
        """Take over what `group_sets` and `set_numbers` gave."""
        self.group_sets = group_sets
        self._set_number = {names: number for number, names in enumerate(group_sets)}
        self._set = Column(np.int32)
        self._set.append(numbers)

    def drop(self, person: str) -> int | None:
        """Forget a person; the number it had."""
        number = self.number.pop(person, None)
        if number is not None:
            self.ids[number] = ""
            self.about.pop(number, None)
        return number

    def after(self, number: int) -> Iterator[int]:
        """The numbers above `number` that are still in use, in order."""
        return (later for later in range(number + 1, len(self.ids)) if self.ids[later])


@dataclass(frozen=True, slots=True)
class Person:
    """A person as the gallery knows them; `templates` maps the number of each template to its quality."""

    person: str
    groups: tuple[str, ...]
    about: dict[str, str]
    templates: dict[int, float]


class State:
    """People and rows. One thread changes it at a time; any number read."""

    def __init__(self, width: int, *, vectors: NDArray[Any] | None = None) -> None:
        """`vectors` (n, width) float16 are the rows of a snapshot; `restore` says whose they are."""
        self.width = width
        self.people = People()
        self.vectors = Column(np.float16, width=width, first=vectors)
        self.owner = Column(np.int32)
        self.serial = Column(np.uint64)
        self.quality = Column(np.float32)
        self.alive = Column(np.bool_)
        self.pictures: dict[int, bytes] = {}  # serial -> SHA-256 of the kept face
        self.dead = 0
        self.next_serial = 1

    def __len__(self) -> int:
        return len(self.alive) - self.dead

    def apply(self, record: Record) -> int:
        """Take a record in; how many rows it adds."""
        if isinstance(record, ForgetRecord):
            self._forget(record)
            return 0
        if record.replace:
            self._forget(ForgetRecord(record.person))
        number = self.people.meet(record.person)
        if record.groups or record.replace:
            self.people.join(number, record.groups)
        if record.about:
            self.people.about[number] = {**self.people.about.get(number, {}), **record.about}
        self._add(number, record.templates)
        return len(record.templates)

    def _add(self, number: int, templates: tuple[Template, ...]) -> None:
        data = b"".join(template.vector for template in templates)
        new = np.frombuffer(data, "<f2").reshape(-1, self.width).astype(np.float16, copy=False)
        for template in templates:
            self.next_serial = max(self.next_serial, template.serial + 1)
            if template.picture:
                self.pictures[template.serial] = template.picture
        self.vectors.append(new)
        self.owner.append([number] * len(templates))
        self.serial.append(np.array([template.serial for template in templates], np.uint64))
        self.quality.append([template.quality for template in templates])
        self.alive.append([True] * len(templates))  # last: a row counts once everything else of it is there

    def _forget(self, record: ForgetRecord) -> None:
        rows = self.rows_of(record.person)
        if record.serial:
            rows = rows[self.serial.take(rows) == record.serial]
        else:
            self.people.drop(record.person)
        for serial in self.serial.take(rows).tolist():
            self.pictures.pop(serial, None)
        self.alive.put(rows, False)
        self.dead += len(rows)

    def rows_of(self, person: str) -> Rows:
        """The living rows of a person."""
        number = self.people.number.get(person)
        if number is None:
            return np.empty(0, np.int64)
        rows: Rows = np.flatnonzero(self.owner.whole() == number)
        rows = rows[self.alive.take(rows)]
        return rows

    def everyone(self) -> Iterator[tuple[str, Rows]]:
        """All persons in the order they came, each with the living rows: as `rows_of`, for all at the price of one."""
        rows = np.flatnonzero(self.alive.whole())
        owners = self.owner.take(rows)
        order = np.argsort(owners, kind="stable")
        rows, owners = rows[order], owners[order]
        numbers = np.fromiter(self.people.after(-1), np.int64)
        starts, ends = np.searchsorted(owners, numbers), np.searchsorted(owners, numbers, side="right")
        for number, start, end in zip(numbers.tolist(), starts, ends, strict=True):
            yield self.people.ids[number], rows[start:end]

    def about(self, person: str, rows: Rows) -> Person:
        """A person as others see them; `rows` are theirs."""
        number = self.people.number[person]
        templates = dict(zip(self.serial.take(rows).tolist(), self.quality.take(rows).tolist(), strict=True))
        return Person(person, self.people.groups(number), dict(self.people.about.get(number, {})), templates)

    def living(self, group: str = "") -> NDArray[np.bool_]:
        """For every row, whether it may be found (in `group`, where one is asked for)."""
        alive = self.alive.whole()
        if not group:
            return alive
        inside: NDArray[np.bool_] = alive & self.people.members(group)[self.owner.slice(0, len(alive))]
        return inside
