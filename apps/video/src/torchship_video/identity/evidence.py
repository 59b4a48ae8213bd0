"""The identities as the browser's page shows them: who was seen last, and the crops by which each is known."""

from __future__ import annotations

from collections.abc import Sequence

from torchship.errors import NotFound
from torchship_video.identity.identities import Identities
from torchship_video.identity.visits import KeptCrop, Visit
from torchship_video.view import EvidenceCrop, IdentityCard


class EvidenceBook:
    """An `IdentityBook` of the page, over the gallery."""

    def __init__(self, identities: Identities, *, most_cards: int = 50, most_crops: int = 8) -> None:
        self._identities, self._most_cards, self._most_crops = identities, most_cards, most_crops

    def cards(self) -> Sequence[IdentityCard]:
        """Those that were seen last, newest first."""
        found = [self._card(number) for number in self._identities.latest(self._most_cards)]
        return [card for card in found if card is not None]

    def crop(self, identity: int, index: int) -> bytes | None:
        """A crop as JPEG, None when it is gone; `index` counts as the card does."""
        crops = self._crops(identity)
        return crops[index][1].jpeg if 0 <= index < len(crops) else None

    def _card(self, number: int) -> IdentityCard | None:
        try:
            visits = self._identities.visits(number)
        except NotFound:  # forgotten in between
            return None
        rivals = sorted({rival for visit in visits for rival, _ in visit.rivals if rival != number})
        return IdentityCard(
            identity=number,
            cameras=tuple(sorted({visit.camera for visit in visits})),
            first=min(visit.first for visit in visits),
            last=max(visit.last for visit in visits),
            ambiguous=any(visit.ambiguous for visit in visits),
            crops=tuple(
                EvidenceCrop(visit.camera, crop.time, round(visit.similarity, 3)) for visit, crop in self._crops(number)
            ),
            words=f"may also be {', '.join(map(str, rivals))}" if rivals else "",
        )

    def _crops(self, number: int) -> list[tuple[Visit, KeptCrop]]:
        """The best crop of each visit first, the newest visit first; then the second best, and so on."""
        try:
            visits = self._identities.visits(number)
        except NotFound:
            return []
        ordered = [(place, -visit.last, visit, crop) for visit in visits for place, crop in enumerate(visit.crops)]
        ordered.sort(key=lambda entry: entry[:2])
        return [(visit, crop) for _, _, visit, crop in ordered[: self._most_crops]]
