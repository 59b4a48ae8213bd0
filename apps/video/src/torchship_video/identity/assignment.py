"""Which identity undecided visits belong to: decided for all of them at once, so that no camera comes first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from torchship_video.identity.transitions import TravelTimes, way
from torchship_video.identity.visits import Vector, Visit


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When two visits are one identity.

    `threshold` is the least cosine similarity with nothing known about travel times; `margin` how much better the best
    identity must fit than the next to be certain; `travel` how much a travel time counts for or against, at most.
    """

    threshold: float
    margin: float = 0.02
    travel: float = 0.06


class IdentityChoice(NamedTuple):
    """Where a visit went. `fit` is similarity and travel time; `after` the visit it came from, None for a new one."""

    visit: Visit
    identity: int
    similarity: float
    ambiguous: bool
    rivals: list[tuple[int, float]]
    after: Visit | None


class _Fit(NamedTuple):
    score: float
    similarity: float
    identity: int


class Assignment:
    """One decision about some visits, given the identities that there are."""

    def __init__(
        self,
        undecided: Sequence[Visit],
        identities: Mapping[int, Sequence[Visit]],
        *,
        vector: Callable[[Visit], Vector],
        times: TravelTimes,
        rule: Rule,
    ) -> None:
        self._vector, self._times, self._rule = vector, times, rule
        self._left = sorted(undecided, key=lambda visit: (visit.first, visit.camera, visit.track, visit.serial))
        self._members = {number: list(visits) for number, visits in identities.items()}
        self._fits: dict[int, dict[int, _Fit]] = {visit.serial: {} for visit in self._left}
        self._compare(list(self._members))

    def decide(self, new_number: Callable[[], int]) -> list[IdentityChoice]:
        """Every visit's identity: the best fit of all first, then a new identity for the earliest that fits none."""
        choices = []
        while self._left:
            best = [(self._best(visit), visit) for visit in self._left]
            fitting = [(found[0], visit) for found, visit in best if found and found[0].score >= self._rule.threshold]
            if fitting:
                fit, visit = max(fitting, key=lambda pair: pair[0].score)
                choice = self._joined(visit, fit)
            else:
                visit = self._left[0]
                choice = IdentityChoice(visit, new_number(), 0.0, False, [], None)
            self._left.remove(visit)
            self._members.setdefault(choice.identity, []).append(visit)
            self._compare([choice.identity])
            choices.append(choice)
        return choices

    def _joined(self, visit: Visit, fit: _Fit) -> IdentityChoice:
        near = [one for one in self._best(visit) if one.score > fit.score - self._rule.margin]
        doubtful = len(near) > 1 or self._wanted_by_another(visit, fit)
        rivals = [(one.identity, round(one.score, 4)) for one in near[:4]] if doubtful else []
        after = nearest(visit, self._members[fit.identity])
        return IdentityChoice(visit, fit.identity, fit.similarity, doubtful, rivals, after)

    def _wanted_by_another(self, visit: Visit, fit: _Fit) -> bool:
        """Whether one that is on the same camera at the same time fits that identity about as well."""
        others = (other for other in self._left if other is not visit and other.meets(visit))
        return any(
            found.score > fit.score - self._rule.margin
            for other in others
            if (found := self._fits[other.serial].get(fit.identity))
        )

    def _best(self, visit: Visit) -> list[_Fit]:
        """The identities that it may be, best first."""
        return sorted(self._fits[visit.serial].values(), key=lambda fit: (-fit.score, fit.identity))

    def _compare(self, numbers: Sequence[int]) -> None:
        """Fit what is left to these identities."""
        rows = [(number, member) for number in numbers for member in self._members[number] if _speaks(member)]
        if not rows or not self._left:
            for visit in self._left:
                for number in numbers:
                    self._fits[visit.serial].pop(number, None)
            return
        known = np.stack([self._vector(member) for _, member in rows])
        similar = np.stack([self._vector(visit) for visit in self._left]) @ known.T
        for visit, line in zip(self._left, similar, strict=True):
            most: dict[int, float] = {}
            for (number, _), value in zip(rows, line.tolist(), strict=True):
                most[number] = max(value, most.get(number, -1.0))
            for number in numbers:
                self._fits[visit.serial].pop(number, None)
            for number, similarity in most.items():
                members = self._members[number]
                if similarity >= self._rule.threshold - self._rule.travel and not any(map(visit.meets, members)):
                    start, end, seconds = way(visit, nearest(visit, members))
                    score = similarity + self._rule.travel * self._times.favour(start, end, seconds)
                    self._fits[visit.serial][number] = _Fit(score, similarity, number)


def _speaks(member: Visit) -> bool:
    """Whether an identity is known by this visit: not while it is doubtful whether it belongs there."""
    return bool(member.vectors) and not member.ambiguous


def nearest(visit: Visit, members: Sequence[Visit]) -> Visit:
    """The member whose time lies nearest to the visit's."""
    return min(members, key=lambda one: (max(one.first - visit.last, visit.first - one.last), one.first, one.camera))
