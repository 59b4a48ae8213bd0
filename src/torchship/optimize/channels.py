"""What pruning is asked for, and what it leaves, as plain data: the wish, the channel map, the rounds of a search."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from torchship.errors import BadConfig

Importance: TypeAlias = Literal["magnitude", "taylor"]


class Prune(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a model is to be pruned.

    `flops` is the share of its multiplications that is to go (0.58: 58 % fewer), `rounds` in how many steps, with
    fine-tuning after each. `multiple`: channel counts are multiples of it. `importance` of a channel: the size of its
    weights, or how much the loss would rise without it (Taylor; needs a loss). `keep` names modules that stay as they
    are. In a search the rounds end early where a call takes at most `latency` milliseconds (0: no such end), and
    `epochs` is the most that the default training takes after each.
    """

    flops: float = 0.5
    rounds: int = 3
    multiple: int = 8
    importance: Importance = "magnitude"
    keep: tuple[str, ...] = ()
    latency: float = 0.0
    epochs: int = 10

    def __post_init__(self) -> None:
        if not 0 < self.flops < 1:
            raise BadConfig(f"prune: flops is {self.flops:g}", hint="a share between 0 and 1, such as 0.5")
        if self.rounds < 1 or self.multiple < 1 or self.epochs < 1:
            raise BadConfig("prune: rounds, multiple and epochs are at least 1")
        if self.latency < 0:
            raise BadConfig(f"prune: latency is {self.latency:g}", hint="milliseconds at batch 1, such as 2ms")


class Kept(msgspec.Struct, omit_defaults=True):
    """Which channels of one layer were kept, by their numbers in the original; None: all."""

    out: list[int] | None = None
    taken: list[int] | None = None  # of its input


ChannelMap: TypeAlias = dict[str, Kept]


class PrunedRound(msgspec.Struct, frozen=True):
    """One round of a search: multiplications of a call before all rounds and after this one, what its training took.

    `widths` tells for each layer that lost outputs how many it has left and had. `weights` is the file of the state
    dict; the channel map lies beside it, under the same name with `.json`, inside this record. `loss` is that of the
    rows that training held back (None: the caller's own training).
    """

    number: int
    flops: float
    whole: float
    seconds: float
    channels: ChannelMap
    widths: dict[str, tuple[int, int]]
    weights: str
    content: str
    rows: int = 0
    epochs: int = 0
    loss: float | None = None

    @property
    def cut(self) -> float:
        """The share of the original's multiplications that is gone."""
        return round(1 - self.flops / self.whole, 3)

    def told(self) -> str:
        """What this round came to, for one line."""
        training = "your training" if self.loss is None else f"{self.epochs} epochs on {self.rows} rows"
        gone = f"{self.cut:.1%} of the multiplications gone after round {self.number}"
        return f"pruned: {gone}, {training}, {self.seconds:.0f} s"
