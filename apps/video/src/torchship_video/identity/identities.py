"""The identities across all cameras: tracks come in with their embeddings, and one number a somebody comes out."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from torchship.errors import BadInput, NotFound
from torchship_video.identity.assignment import Assignment, Rule, nearest
from torchship_video.identity.storage import SavedGallery, Storage
from torchship_video.identity.transitions import Learned, TravelTimes, way
from torchship_video.identity.visits import Vector, Visit, unit
from torchship_video.messages import Observation

_PAST = 8  # merges that can be split back into their numbers
_BACK = 60.0  # seconds: a clock that is so far behind was set back
_RESERVED = 64  # numbers that are on disk as given before they are: none is given twice, whatever dies


class Bounds(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a gallery holds at most, and its times in seconds.

    `window`: who was not seen for so long is forgotten. `period`: undecided tracks are decided so often, all at once.
    `ripe`: a track is decided when it has `least` embeddings, or once it is so old. `lost`: a track that was not seen
    for so long has ended; should its number come again, it is another track.
    """

    window: float = 1800.0
    period: float = 0.5
    ripe: float = 3.0
    lost: float = 5.0
    least: int = 6
    most_identities: int = 2000
    most_visits: int = 16
    most_open: int = 1024


class Identities:
    """All identities, in memory and in a folder (`root`; without one they live as long as the process).

    Times are seconds of one clock for all cameras. What waits for the disk is `flush`, `merge`, `split`, `forget` and
    `close`; everything may be called from any thread. Two tracks that were seen at one time on one camera are never
    one identity.
    """

    def __init__(
        self,
        root: Path | str | None = None,
        *,
        embedder: str,
        width: int,
        rule: Rule,
        bounds: Bounds = Bounds(),  # noqa: B008  # frozen
    ) -> None:
        self._width, self._rule, self.bounds, self._embedder = width, rule, bounds, embedder
        self._guard, self._disk = threading.RLock(), threading.RLock()  # taken in the order disk, guard
        self._storage = Storage(Path(root), embedder=embedder, width=width) if root is not None else None
        self._members: dict[int, list[Visit]] = {}
        self._open: dict[tuple[str, int], Visit] = {}
        self._vectors: dict[int, Vector] = {}  # the means, by serial
        self._fresh: set[int] = set()  # serials with evidence since they were last decided
        self._dirty: set[int] = set()
        self._gone: set[int] = set()
        self._saved_last: dict[int, float] = {}
        self._times = TravelTimes(window=bounds.window)
        self._cell, self._now = float("-inf"), float("-inf")
        self._next_identity = self._next_serial = 1
        self.refused = 0
        if self._storage is not None:
            shared = self._storage.shared
            self._members = self._storage.load()
            self._times.load(shared.times)
            self._next_identity, self._next_serial = shared.next_identity, shared.next_serial
        self._reserved = (self._next_identity, self._next_serial)

    # -- what the flow calls ---------------------------------------------------------------------------------------

    def observe(self, observation: Observation, *, time: float | None = None) -> Observation:
        """The same with the identity of every confirmed track, as far as it is known; `time` is the frame's own."""
        moment = observation.frame.taken if time is None else time
        camera = observation.frame.camera
        with self._guard:
            self._advance(moment)
            confirmed = [track for track in observation.tracks if track.confirmed]
            found = {track.number: self._touch(camera, track.number, moment) for track in confirmed}
            for visit in found.values():
                if visit is not None:
                    self._part(visit)
            tracks = []
            for track in observation.tracks:
                visit = found.get(track.number)
                if visit is not None and visit.identity:
                    track = msgspec.structs.replace(track, identity=visit.identity, ambiguous=visit.ambiguous)  # noqa: PLW2901
                tracks.append(track)
        return msgspec.structs.replace(observation, tracks=tuple(tracks))

    def update(
        self, camera: str, track: int, embedding: Iterable[float], quality: float, time: float, *, crop: bytes = b""
    ) -> tuple[int, bool]:
        """Take an embedding of a track, and its picture as JPEG; the track's identity, 0 while it is not known, and
        whether that is ambiguous. Undecided tracks are decided every `period`, so a new one is known a little later.

        Raises BadInput for an embedding of another width, or that is not finite.
        """
        vector = unit(embedding, width=self._width)
        with self._guard:
            self._advance(time)
            visit = self._touch(camera, track, time)
            if visit is None:
                return 0, False
            if visit.add(vector, quality=float(quality), crop=crop, time=time):
                self._vectors.pop(visit.serial, None)
                self._fresh.add(visit.serial)
                self._mark(visit.identity)
            self._part(visit)
            return visit.identity, visit.ambiguous

    def decide(self) -> None:
        """Decide now what can be decided: at the end of a recording, where no later frame comes."""
        with self._guard:
            self._decide(final=True)

    def restarted(self, camera: str) -> None:
        """The tracker of a camera began anew: its numbers mean others now."""
        with self._guard:
            for key in [key for key in self._open if key[0] == camera]:
                self._end(key)

    # -- what people ask -------------------------------------------------------------------------------------------

    def numbers(self) -> list[int]:
        """All identities, the newest last."""
        with self._guard:
            return sorted(self._members)

    def latest(self, count: int) -> list[int]:
        """The identities that were seen last, newest first."""
        with self._guard:
            last = {number: max(visit.last for visit in visits) for number, visits in self._members.items()}
            return sorted(last, key=lambda number: (-last[number], -number))[:count]

    def visits(self, identity: int) -> list[Visit]:
        """The visits of an identity as they are now, earliest first. Raises NotFound."""
        with self._guard:
            return sorted(map(msgspec.structs.replace, self._known(identity)), key=lambda visit: visit.first)

    def transitions(self) -> list[Learned]:
        """The travel times between cameras that were learned."""
        with self._guard:
            return self._times.table()

    def merge(self, into: int, other: int) -> None:
        """Both are one, under the number `into`. Raises NotFound, BadInput where they met on one camera."""
        with self._disk:
            with self._guard:
                one, two = self._known(into), self._known(other)
                if into == other:
                    raise BadInput(f"identity {into} cannot be merged with itself")
                met = next(((a, b) for a in one for b in two if a.meets(b)), None)
                if met is not None:
                    raise BadInput(
                        f"identities {into} and {other} were both on camera {met[0].camera} at one time (visits "
                        f"{met[0].serial} and {met[1].serial})",
                        hint="they are two; split the visit that is wrong first",
                    )
                for visit in two:
                    visit.past = [*visit.past, other][-_PAST:]
                    self._times.learn(*way(visit, nearest(visit, one)))
                for visit in (*one, *two):
                    visit.identity, visit.ambiguous, visit.by_hand, visit.rivals = into, False, True, []
                self._members[into] = one + two
                del self._members[other]
                self._gone.add(other)
                changes = self._changes([into])
            self._write(*changes)

    def split(self, identity: int, serials: Sequence[int]) -> int:
        """These visits are somebody else: the number of the new identity. Visits that were one identity before a
        merge get that number back. Raises NotFound, BadInput when nothing or everything would go."""
        with self._disk:
            with self._guard:
                members = self._known(identity)
                leaving = [visit for visit in members if visit.serial in set(serials)]
                missing = sorted(set(serials) - {visit.serial for visit in leaving})
                if missing:
                    raise NotFound(f"identity {identity} has no visit {missing[0]}", hint="list its visits first")
                if not leaving or len(leaving) == len(members):
                    raise BadInput(
                        f"identity {identity} has {len(members)} visits, {len(leaving)} of them were named",
                        hint="name some of them, not all",
                    )
                number = self._number_back(leaving) or self._new_number()
                for visit in members:
                    visit.ambiguous, visit.by_hand, visit.rivals = False, True, []
                for visit in leaving:
                    visit.identity = number
                self._members[number] = leaving
                self._members[identity] = [visit for visit in members if visit not in leaving]
                self._gone.discard(number)
                changes = self._changes([number, identity])
            self._write(*changes)
        return number

    def forget(self, identity: int) -> int:
        """Remove an identity with all its embeddings and crops, from memory and disk; how many visits went.

        Its tracks that are still there begin as somebody new. Raises NotFound.
        """
        with self._disk:
            with self._guard:
                members = self._known(identity)
                self._drop(identity)
                changes = self._changes([])
            self._write(*changes)
        return len(members)

    # -- the disk --------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Write what changed. Call it every few seconds, in a thread."""
        with self._disk:
            with self._guard:
                changes = self._changes(sorted(self._dirty))
            self._write(*changes)

    def close(self) -> None:
        """Write everything and let another process have the folder."""
        with self._disk:
            with self._guard:
                self._dirty |= self._members.keys()
                self._reserved = self._next_identity, self._next_serial
            self.flush()
            if self._storage is not None:
                self._storage.close()
                self._storage = None

    def _changes(self, numbers: Sequence[int]) -> tuple[SavedGallery, dict[int, bytes], list[int]]:
        """What is to be written of these identities, and of all that is gone, as it is at this moment."""
        gone = sorted(self._gone)
        self._gone.clear()
        self._dirty -= {*numbers, *gone}
        shared = SavedGallery(1, self._embedder, self._width, *self._reserved, self._times.dump())
        if self._storage is None:
            return shared, {}, gone
        there = [number for number in numbers if number in self._members]
        for number in there:
            self._saved_last.update({visit.serial: visit.last for visit in self._members[number]})
        return shared, {number: self._storage.encode(number, self._members[number]) for number in there}, gone

    def _write(self, shared: SavedGallery, identities: dict[int, bytes], gone: list[int]) -> None:
        """See changes onto the disk: what is new first, then what is gone. What failed is tried again by `flush`."""
        if self._storage is None:
            return
        try:
            if shared != self._storage.shared:
                self._storage.save_shared(shared)
            if identities:
                self._storage.save(identities)
            if gone:
                self._storage.remove(gone)
        except BaseException:
            with self._guard:
                self._dirty |= identities.keys() & self._members.keys()
                self._gone |= set(gone) - self._members.keys()
            raise

    # -- inside ----------------------------------------------------------------------------------------------------

    def _known(self, identity: int) -> list[Visit]:
        if identity not in self._members:
            raise NotFound(
                f"there is no identity {identity}", hint="it was forgotten, merged, or is older than the window"
            )
        return self._members[identity]

    def _advance(self, time: float) -> None:
        cell = time // self.bounds.period
        if time < self._now - _BACK:
            self._now, self._cell = time, cell - 1
        self._now = max(self._now, time)
        if cell > self._cell:
            self._cell = cell
            for key in [key for key, visit in self._open.items() if visit.last < self._now - self.bounds.lost]:
                self._end(key)
            self._decide()
            self._expire()

    def _touch(self, camera: str, track: int, time: float) -> Visit | None:
        """The track was there at that time; its visit, None when there are too many."""
        key = camera, track
        visit = self._open.get(key)
        if visit is None or not visit.first - self.bounds.lost <= time <= visit.last + self.bounds.lost:
            self._end(key)
            if len(self._open) >= self.bounds.most_open:
                self.refused += 1
                return None
            visit = self._open[key] = Visit(self._new_serial(), camera, track, time, time)
        visit.first, visit.last = min(visit.first, time), max(visit.last, time)
        if visit.identity and visit.last - self._saved_last.get(visit.serial, visit.first) > self.bounds.lost:
            self._mark(visit.identity)
        return visit

    def _part(self, visit: Visit) -> None:
        """An identity that turns out to be twice on one camera keeps the visit that began first."""
        if not visit.identity:
            return
        members = self._members[visit.identity]
        for other in members:
            if other is not visit and other.meets(visit):
                late = max(visit, other, key=lambda one: (one.first, one.serial))
                members.remove(late)
                self._mark(visit.identity)
                late.identity, late.similarity, late.ambiguous, late.by_hand, late.rivals = 0, 0.0, False, False, []
                self._fresh.add(late.serial)
                if (late.camera, late.track) not in self._open or self._open[late.camera, late.track] is not late:
                    self._place(late, self._new_number())
                return self._part(visit)

    def _end(self, key: tuple[str, int]) -> None:
        visit = self._open.pop(key, None)
        if visit is None:
            return
        if visit.identity:
            self._mark(visit.identity)
        elif visit.vectors:  # it went before it was ripe
            self._settle([visit])
        if not visit.vectors:
            self._fresh.discard(visit.serial)

    def _decide(self, *, final: bool = False) -> None:
        bounds = self.bounds
        ripe = [
            visit
            for visit in self._open.values()
            if visit.serial in self._fresh
            and visit.vectors
            and not visit.by_hand
            and (not visit.identity or visit.ambiguous)
            and (final or len(visit.vectors) >= bounds.least or self._now - visit.first >= bounds.ripe)
        ]
        if ripe:
            self._settle(ripe)

    def _settle(self, ripe: Sequence[Visit]) -> None:
        """Give these visits their identities; those that were ambiguous are decided anew."""
        before = {visit.serial: visit.identity for visit in ripe}
        for visit in ripe:
            if visit.identity:
                self._members[visit.identity].remove(visit)
            self._fresh.discard(visit.serial)
        mine = {number: members for number, members in self._members.items() if members}
        assignment = Assignment(ripe, mine, vector=self._vector, times=self._times, rule=self._rule)
        choices = assignment.decide(self._new_number)
        for choice in choices:
            visit = choice.visit
            visit.similarity, visit.ambiguous, visit.rivals = choice.similarity, choice.ambiguous, choice.rivals
            self._place(visit, choice.identity)
        for choice in choices:
            if choice.after is not None and not choice.ambiguous:
                self._times.learn(*way(choice.visit, choice.after))
        for number in {number for number in before.values() if number and not self._members[number]}:
            self._drop(number)

    def _place(self, visit: Visit, number: int) -> None:
        visit.identity = number
        members = self._members.setdefault(number, [])
        members.append(visit)
        self._mark(number)
        if len(members) > self.bounds.most_visits:  # the oldest that has ended goes
            ended = [one for one in members if self._open.get((one.camera, one.track)) is not one]
            if ended:
                oldest = min(ended, key=lambda one: one.last)
                members.remove(oldest)
                self._clear(oldest)

    def _expire(self) -> None:
        last = {number: max(visit.last for visit in members) for number, members in self._members.items()}
        for number in [number for number, seen in last.items() if seen < self._now - self.bounds.window]:
            self._drop(number)
        over = len(self._members) - self.bounds.most_identities
        for number in sorted(self._members, key=last.__getitem__)[: max(over, 0)]:
            self._drop(number)

    def _drop(self, number: int) -> None:
        """Forget in memory; the file goes with the next flush."""
        for visit in self._members.pop(number):
            self._clear(visit)
            if self._open.get((visit.camera, visit.track)) is visit:
                del self._open[visit.camera, visit.track]
        for members in self._members.values():
            for visit in members:
                if any(rival == number for rival, _ in visit.rivals):
                    visit.rivals = [rival for rival in visit.rivals if rival[0] != number]
                    self._mark(visit.identity)
        self._dirty.discard(number)
        self._gone.add(number)

    def _clear(self, visit: Visit) -> None:
        self._vectors.pop(visit.serial, None)
        self._saved_last.pop(visit.serial, None)
        self._fresh.discard(visit.serial)

    def _mark(self, number: int) -> None:
        if number:
            self._dirty.add(number)
            self._gone.discard(number)

    def _vector(self, visit: Visit) -> Vector:
        found = self._vectors.get(visit.serial)
        if found is None:
            found = self._vectors[visit.serial] = visit.mean()
        return found

    def _number_back(self, leaving: Sequence[Visit]) -> int:
        """The number that all of these had before their last merge, if it is free; else 0."""
        last = {visit.past[-1] if visit.past else 0 for visit in leaving}
        number = last.pop()
        if last or not number or number in self._members:
            return 0
        for visit in leaving:
            visit.past = visit.past[:-1]
        return number

    def _new_number(self) -> int:
        self._next_identity += 1
        self._reserve()
        return self._next_identity - 1

    def _new_serial(self) -> int:
        self._next_serial += 1
        self._reserve()
        return self._next_serial - 1

    def _reserve(self) -> None:
        identity, serial = self._reserved
        if self._next_identity > identity or self._next_serial > serial:
            self._reserved = self._next_identity + _RESERVED, self._next_serial + _RESERVED
