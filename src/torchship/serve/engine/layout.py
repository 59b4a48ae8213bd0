"""The layout of a line: how a checked plan becomes stations with workers, and which tensors each takes and gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import numpy as np

from torchship.artifact import Store
from torchship.errors import TorchshipError
from torchship.pipeline.planning import Node, Plan
from torchship.serve.engine.ipc.arena import size_of_rows
from torchship.serve.engine.padding import Padding
from torchship.serve.engine.queue import Visit
from torchship.serve.engine.replica import Blueprint
from torchship.serve.engine.station import Crew, Station
from torchship.serve.engine.worker import Kit
from torchship.stage import Value, select
from torchship.tensors import Array, NanPolicy

_SLOT_LIMIT = 2**28  # bytes; a bigger batch travels in memory of its own
_SLOT_FREE = 2**20  # bytes of a slot for each tensor whose size is not known


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a line takes: rows and bytes waiting and running, seconds from arrival to answer, and its crews."""

    queue_rows: int = 4096
    queue_bytes: int = 2**28
    timeout: float = 60.0
    max_timeout: float = 3600.0
    max_wait: float = 0.0
    depth: int = 2
    run_timeout: float = 60.0
    open_timeout: float = 120.0
    sequence_idle: float = 60.0
    priority: int = 2
    memory: int = 0
    nice: int = 0
    cpus: tuple[int, ...] = ()
    nan: NanPolicy = "allow"


@dataclass(slots=True, eq=False)
class Leg:
    """A node with its station: the slots it takes, gives and lets go, and the legs that wait for it.

    `loose` are the inputs whose shape varies; `special`: its visits need more than to be queued.
    """

    node: Node
    station: Station
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    defaults: dict[str, Value]
    loose: tuple[int, ...]
    batched: bool
    most: int
    special: bool
    sequential: bool = False
    padding: Padding | None = None
    drops: tuple[str, ...] = ()
    followers: list[int] = field(default_factory=list)

    @property
    def lands(self) -> bool:
        """Whether a batch can go home as one: rows are rows, and no answer needs a second look."""
        return self.batched and not self.node.streams and self.padding is None

    def cut(self, visit: Visit) -> list[Visit]:
        """More rows than a batch: several visits, whose answers are joined again."""
        starts = range(0, visit.rows, self.most)
        gather = Gather(self, [[]] * len(starts), len(starts), visit.finish)
        chunks = [[array[start : start + self.most] for array in visit.arrays] for start in starts]
        return [
            Visit(visit.job, arrays, len(arrays[0]), gather.add, visit.values, visit.key, index)
            for index, arrays in enumerate(chunks)
        ]


@dataclass(slots=True, eq=False)
class Gather:
    """A visit that was cut into chunks, because it has more rows than a batch."""

    leg: Leg
    parts: list[list[Array]]
    left: int
    finish: Callable[[Visit, list[Array]], None]

    def add(self, visit: Visit, outputs: list[Array]) -> None:
        """One chunk is back; `visit.leg` is its number."""
        self.parts[visit.leg] = outputs
        self.left -= 1
        if not self.left:
            visit.leg = self.leg
            self.finish(visit, [np.concatenate(parts) for parts in zip(*self.parts, strict=True)])


def lay(node: Node, *, store: Store, limits: Limits, fail: Callable[[Visit, TorchshipError], None]) -> Leg:
    """The leg for a node, its station not yet open."""
    config, signature = node.config, node.signature
    sizes = [
        min(_SLOT_LIMIT, size_of_rows(specs, rows=node.max_batch, batched=signature.batched, free=_SLOT_FREE))
        for specs in (signature.inputs, signature.outputs)
    ]
    loose = tuple(
        index
        for index, spec in enumerate(signature.inputs)
        if not all(isinstance(axis, int) for axis in spec.shape[1:])
    )
    kinds = {spec.dtype for spec in signature.inputs}
    fits = signature.batched and not loose and sizes[0] < _SLOT_LIMIT and "BYTES" not in kinds
    blueprint = Blueprint(
        name=node.name,
        opener="torchship.serve.engine.worker:open_configured",
        stage=Kit(config, str(store.root)),
        signature=str(signature),
        batched=signature.batched,
        fits=fits,
        inputs=tuple([(spec.dtype, tuple(spec.wire_shape[1:])) for spec in signature.inputs]) if fits else (),
        depth=limits.depth,
        input_size=sizes[0],
        output_size=sizes[1],
        private=bool(config.run),
        warm=bool(config.artifact),
        threads=config.threads or (1 if config.run else None),
        cpus=limits.cpus,
        nice=limits.nice,
        open_timeout=limits.open_timeout,
    )
    crew = Crew(copies=config.copies, run_timeout=limits.run_timeout, max_wait=limits.max_wait, memory=limits.memory)
    station = Station(blueprint, signature=signature, max_batch=node.max_batch, crew=crew, fail=fail)
    defaults = select(node.parameters, {}, node.defaults)
    return Leg(
        node,
        station,
        takes=node.takes,
        gives=node.gives,
        defaults=defaults,
        loose=loose if signature.batched else (),
        batched=signature.batched,
        most=node.max_batch,
        padding=Padding(config.buckets, signature=signature, stage=node.name) if config.buckets else None,
        sequential=any(parameter.name == "sequence_id" for parameter in node.parameters),
        special=bool(loose or defaults or node.streams or (node.after and not node.checked)),
    )


def shorten(plan: Plan, legs: list[Leg]) -> Leg | None:
    """A line of one station goes by the request's own names: its leg. A row of stations lets go what is used up."""
    if len(legs) == 1 and legs[0].gives == plan.outputs:
        only = legs[0]
        inputs = {key: spec.name for key, spec in zip(plan.inputs, plan.signature.inputs, strict=True)}
        only.takes = tuple([inputs[key] for key in only.takes])
        only.gives = tuple([spec.name for spec in plan.signature.outputs])
        return only
    if all(leg.node.index - 1 in leg.node.after for leg in legs[1:]):
        held = set(plan.inputs)
        for leg in legs:
            held |= set(leg.gives)
            leg.drops = tuple(held - set(leg.node.keeps))
            held -= set(leg.drops)
    return None
