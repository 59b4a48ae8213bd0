"""What won on similar models: tried right after eager, never trusted.

On this machine, as earlier searches taught: one small file for each kind of model, machine and goal, below `winners/`
in the cache; a hint, no record: of two searches that end at once one may be lost. Behind that, on processors like this
one: `winners.toml`, which is shipped so that the first search on a machine knows something, too.
"""

from __future__ import annotations

import tomllib
from collections import Counter
from functools import cache
from importlib import resources

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


class ShippedRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What won for a kind of model and a goal, best first, where the processor has all of `features`; `measured` says
    on what."""

    kind: str
    goal: str
    features: tuple[str, ...]
    won: tuple[str, ...]
    measured: str


@cache
def shipped() -> tuple[ShippedRow, ...]:
    """The rows of `winners.toml`; the first that fits counts."""
    text = resources.files(__package__).joinpath("winners.toml").read_text()
    return msgspec.convert(tomllib.loads(text)["row"], tuple[ShippedRow, ...])


def kind_of(model: Model) -> str:
    """recurrent, attention, convolution or dense, by the classes inside; and whether there is data for quantizers."""
    names = {type(part).__name__ for part in model.module.modules()}
    found = (kind for kind, words in _KINDS.items() for word in words if any(word in name for name in names))
    return f"{next(found, 'dense')}{' with data' if model.calibration else ''}"


def known(context: SearchContext) -> list[str]:
    """Labels of what won before: on this machine, the most frequent first; then on others like it."""
    kind, goal, features = kind_of(context.model), context.config.goal, set(context.hardware.features)
    learned = [label for label, _ in Counter(_table(context).won).most_common()]
    fitting = (row for row in shipped() if (row.kind, row.goal) == (kind, goal) and features.issuperset(row.features))
    row = next(fitting, None)
    return list(dict.fromkeys([*learned, *(row.won if row else ())]))


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
