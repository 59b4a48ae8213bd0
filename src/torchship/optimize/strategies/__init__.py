"""Strategies: each says which recipes to try next, given the results; the loop alone owns time, cache and events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from torchship.optimize.trial import Trial
from torchship.recipe import Recipe


class Asked(msgspec.Struct, frozen=True):
    """A recipe to try. `note` is told with its trial; `skip` and `failure` say why it needs no attempt; `urgent` is
    tried whatever the budget.
    """

    recipe: Recipe
    note: str = ""
    skip: str = ""
    failure: str = ""
    urgent: bool = False


class Strategy(Protocol):
    """One way to find recipes. Adding a way is adding a file, and its place in the search's list."""

    def ask(self, results: Sequence[Trial]) -> list[Asked]:
        """What to try next, the best first; the loop takes the first, and asks again. Nothing where it is done."""
        ...
