"""The nodes of a line: each stage of a checked plan with its station, and which tensors it takes, gives and lets go."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from torchship.artifact import Store
from torchship.errors import TorchshipError
from torchship.pipeline.planning import Node, Plan
from torchship.serve.engine.padding import Padding
from torchship.serve.engine.queue import StageCall
from torchship.serve.engine.replica import StartReplica
from torchship.serve.engine.spec import LineLimits, StageModel, WorkerSpec, placements
from torchship.serve.engine.station import Station
from torchship.stage import Value, select
from torchship.tensors import Array


@dataclass(slots=True, eq=False)
class StageNode:
    """A node of the plan with its station: the slots it takes, gives and lets go, and the nodes that wait for it.

    `loose` are the inputs whose shape varies, or that may be absent; `special`: its calls need more than to be queued.
    """

    planned: Node
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
    def joined(self) -> bool:
        """Whether a batch can go home as one: rows are rows, and no answer needs a second look."""
        return self.batched and not self.planned.streams and self.padding is None

    def cut(self, call: StageCall) -> list[StageCall]:
        """More rows than a batch: several calls, whose `node` is their number and whose answers are joined again."""
        starts = range(0, call.rows, self.most)
        parts: list[list[Array]] = [[]] * len(starts)

        def finish(part: StageCall, outputs: list[Array]) -> None:
            parts[part.node] = outputs
            if all(parts):
                call.finish(call, [np.concatenate(found) for found in zip(*parts, strict=True)])

        chunks: list[list[Any]] = [
            [None if array is None else array[start : start + self.most] for array in call.arrays] for start in starts
        ]
        return [
            StageCall(call.job, arrays, len(arrays[0]), finish, call.values, call.key, index)
            for index, arrays in enumerate(chunks)
        ]


def build(
    node: Node,
    *,
    store: Store,
    limits: LineLimits,
    start: StartReplica,
    turns: asyncio.Semaphore,
    fail: Callable[[StageCall, TorchshipError], None],
) -> StageNode:
    """The node of a line for one of a plan, its station not yet open."""
    config, signature = node.config, node.signature
    model = StageModel(name=node.name, config=config, store=store.named, signature=signature, max_batch=node.max_batch)
    specs = [WorkerSpec(model=model, placement=place, limits=limits) for place in placements(config, limits)]
    defaults = select(node.parameters, {}, node.defaults)
    return StageNode(
        node,
        Station(specs, start=start, turns=turns, fail=fail),
        takes=node.takes,
        gives=node.gives,
        defaults=defaults,
        loose=model.loose if signature.batched else (),
        batched=signature.batched,
        most=node.max_batch,
        padding=Padding(config.buckets, signature=signature, stage=node.name) if config.buckets else None,
        sequential=any(parameter.name == "sequence_id" for parameter in node.parameters),
        special=bool(model.loose or defaults or node.streams or (node.after and not node.checked)),
    )


def shorten(plan: Plan, nodes: list[StageNode]) -> StageNode | None:
    """A line of one station goes by the request's own names: its node. A row of stations lets go what is used up."""
    if len(nodes) == 1 and nodes[0].gives == plan.outputs:
        only = nodes[0]
        inputs = {key: spec.name for key, spec in zip(plan.inputs, plan.signature.inputs, strict=True)}
        only.takes = tuple([inputs[key] for key in only.takes])
        only.gives = tuple([spec.name for spec in plan.signature.outputs])
        return only
    if all(node.planned.index - 1 in node.planned.after for node in nodes[1:]):
        held = set(plan.inputs)
        for node in nodes:
            held |= set(node.gives)
            node.drops = tuple(held - set(node.planned.keeps))
            held -= set(node.drops)
    return None
