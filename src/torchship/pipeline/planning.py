"""The Plan: a pipeline after its check, ready to be run in one process (Composed) or many (the Line)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import msgspec

from torchship.artifact import Store
from torchship.errors import BadConfig
from torchship.pipeline.config import PipelineConfig, StageConfig
from torchship.pipeline.describe import Description, describe
from torchship.pipeline.layout import Layout, Node
from torchship.pipeline.wiring import Bench, Slot
from torchship.stage import Parameter
from torchship.tensors import Signature

__all__ = ["Node", "Plan", "plan"]


@dataclass(frozen=True)
class Plan:
    """A checked pipeline. `inputs` and `outputs` are the slots of `signature`, in its order.

    `signature.batched` holds when every node is a row stage: then the rows of many requests may be joined from end
    to end. `labels` are those of the last artifact that has some.
    """

    name: str
    config: PipelineConfig
    signature: Signature
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    parameters: tuple[Parameter, ...]
    labels: tuple[str, ...] = ()

    @property
    def streams(self) -> bool:
        """Whether the last stage gives several answers."""
        return self.nodes[-1].streams

    @property
    def max_batch(self) -> int:
        """Rows that every row stage takes at once; 1 for a pipeline of job stages. More rows run in chunks."""
        return min(node.max_batch for node in self.nodes) if self.signature.batched else 1


def plan(
    config: PipelineConfig,
    store: Store | None = None,
    *,
    where: str = "$",
    describing: Callable[[StageConfig, Store], Description] = describe,
) -> Plan:
    """Check a pipeline and lay out which tensor goes where. Nothing is opened.

    `where` is the path of the pipeline in its file, for messages such as `$.model[0].stages[1].inputs: ...`.
    `describing=describe_apart` imports Python stages in a child process. Raises BadConfig, NotFound, ArtifactError.
    """
    layout = Layout(store or Store(), describing)
    bench, outputs = layout.lay(config, where=where)
    if any(node.streams for node in layout.nodes[:-1]):
        raise BadConfig(f"{where}.stages: only the last stage may give several answers")
    return _finish(config, layout, bench, outputs, where)


def _finish(config: PipelineConfig, layout: Layout, bench: Bench, outputs: tuple[Slot, ...], where: str) -> Plan:
    nodes = layout.nodes
    known = {parameter.name for node in nodes for parameter in node.parameters}
    if set(config.parameters) - known:
        raise BadConfig(
            f"{where}.parameters: no stage has {sorted(set(config.parameters) - known)}",
            hint=f"there is {', '.join(sorted(known)) or 'none'}",
        )
    inputs = tuple({slot.key: slot for slot in bench.by_key.values() if slot.node < 0}.values())
    keys = tuple(slot.key for slot in outputs)
    placed = []
    for node in nodes:
        wanted = {key for later in nodes[node.index + 1 :] for key in later.takes} | set(keys)
        made = {key for earlier in nodes[: node.index + 1] for key in earlier.gives} | {slot.key for slot in inputs}
        placed.append(replace(node, keeps=tuple(sorted(wanted & made))))
    batched = all(node.signature.batched for node in nodes)
    signature = Signature(tuple(s.spec for s in inputs), tuple(s.spec for s in outputs), batched)
    return Plan(
        name=config.name,
        config=config,
        signature=signature,
        inputs=tuple(slot.key for slot in inputs),
        outputs=keys,
        nodes=tuple(placed),
        parameters=_merge(placed, where),
        labels=layout.labels,
    )


def _merge(nodes: list[Node], where: str) -> tuple[Parameter, ...]:
    """One Parameter a name, with the bounds that all stages accept and the default that this pipeline gives."""
    merged: dict[str, Parameter] = {}
    for node in nodes:
        for parameter in node.parameters:
            mine = msgspec.structs.replace(parameter, default=node.defaults.get(parameter.name, parameter.default))
            known = merged.setdefault(mine.name, mine)
            if type(known.default) is not type(mine.default):
                raise BadConfig(
                    f"{where}.stages[{node.index}]: parameter {mine.name!r} is {type(mine.default).__name__} here and "
                    f"{type(known.default).__name__} in another stage"
                )
            lows = [p.low for p in (known, mine) if p.low is not None]
            highs = [p.high for p in (known, mine) if p.high is not None]
            merged[mine.name] = msgspec.structs.replace(
                known,
                low=max(lows, default=None),
                high=min(highs, default=None),
                about=known.about or mine.about,
            )
    return tuple(merged.values())
