"""What won on similar models on this machine, learned from earlier searches: tried right after eager, never trusted.

One small file for each kind of model, machine and goal, below `winners/` in the cache; a hint, no record: of two
searches that end at once one may be lost.
"""

from __future__ import annotations

from collections import Counter

import msgspec

from torchship.model import Model
from torchship.optimize.attempt import SearchContext
from torchship.optimize.cache import digest
from torchship.optimize.facts import Facts

# the first kind that has one of these words in a class name of the model
_KINDS = {"recurrent": ("LSTM", "GRU", "RNN"), "attention": ("Attention", "Transformer"), "convolution": ("Conv",)}


class Winners(msgspec.Struct, frozen=True):
    """How many searches each recipe, by its label, has won."""

    kind: str
    hardware: str
    goal: str
    won: dict[str, int] = {}


def kind_of(model: Model) -> str:
    """recurrent, attention, convolution or dense, by the classes inside; and whether there is data for quantizers."""
    names = {type(part).__name__ for part in model.module.modules()}
    found = (kind for kind, words in _KINDS.items() for word in words if any(word in name for name in names))
    return f"{next(found, 'dense')}{' with data' if model.calibration else ''}"


def known(context: SearchContext) -> list[str]:
    """Labels of what won before, the most frequent first."""
    return [label for label, _ in Counter(_table(context).won).most_common()]


def learn(facts: Facts, *, context: SearchContext) -> None:
    """Count what won a whole search; not a winner out of the cache, which has been counted, nor a caller's own list."""
    winner = facts.winner
    if winner is None or winner.cached or facts.interrupted or context.config.recipes is not None:
        return
    table = _table(context)
    won = table.won | {winner.recipe.label: table.won.get(winner.recipe.label, 0) + 1}
    context.cache.keep("winners", _key(table), msgspec.structs.replace(table, won=won))


def _table(context: SearchContext) -> Winners:
    empty = Winners(kind_of(context.model), context.hardware.line, context.config.goal)
    return context.cache.kept("winners", _key(empty), Winners) or empty


def _key(table: Winners) -> str:
    return digest(table.kind, table.hardware, table.goal)
