"""The Plan: a pipeline after its check, ready to be run in one process (Composed) or many (the Line)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import msgspec

from torchship.artifact import Store
from torchship.errors import BadConfig, BadInput, TorchshipError
from torchship.pipeline.config import PipelineConfig, StageConfig
from torchship.pipeline.describe import Description, blame, describe
from torchship.pipeline.wiring import REQUEST, Bench, Slot, connect, is_proven, relax
from torchship.stage import Parameter, Value
from torchship.tensors import Free, Signature, TensorSpec


@dataclass(frozen=True)
class Node:
    """One stage in its place.

    `takes[i]` and `gives[i]` are the slots of input and output i of `signature`, `after` the nodes it waits for,
    `keeps` the slots that must outlive it: they feed later nodes or are outputs of the pipeline. `defaults` are the
    pipeline's values for its `parameters`. Axis 0 of a row stage's `signature` has no upper bound. Where `checked`
    is false, the taken tensors must be checked at run time.
    """

    index: int
    name: str
    config: StageConfig
    signature: Signature
    max_batch: int
    parameters: tuple[Parameter, ...]
    defaults: Mapping[str, Value]
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    after: tuple[int, ...]
    checked: bool
    keeps: tuple[str, ...] = ()
    streams: bool = False


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
    if not config.stages:
        raise BadConfig(f"{where}.stages: a pipeline needs at least one stage")
    store = store or Store()
    bench = Bench()
    nodes: list[Node] = []
    labels: tuple[str, ...] = ()
    for index, given in enumerate(config.stages):
        path = f"{where}.stages[{index}]"
        try:
            described = describing(given, store)
        except TorchshipError as fault:
            raise blame(fault, where=path) from None
        described = msgspec.structs.replace(described, signature=relax(described.signature))
        stage = _with_labels(given, described, labels)
        labels = described.labels or labels
        if not index:
            bench.put(_request(config, described.signature, where))
        nodes.append(_place(stage, described, config=config, nodes=nodes, bench=bench, path=path))
    if any(node.streams for node in nodes[:-1]):
        raise BadConfig(f"{where}.stages: only the last stage may give several answers")
    return _finish(config, nodes, bench, labels, where)


def _with_labels(stage: StageConfig, described: Description, labels: tuple[str, ...]) -> StageConfig:
    if not described.takes_labels or not labels or "labels" in stage.options:
        return stage
    return msgspec.structs.replace(stage, options={**stage.options, "labels": list(labels)})


def _request(config: PipelineConfig, first: Signature, where: str) -> tuple[Slot, ...]:
    specs = first.inputs
    renamed = config.stages[0].inputs
    if config.inputs:
        try:
            specs = tuple(map(TensorSpec.parse, config.inputs))
        except BadConfig as fault:
            raise blame(fault, where=f"{where}.inputs") from None
    elif renamed:
        specs = tuple(msgspec.structs.replace(spec, name=renamed.get(spec.name, spec.name)) for spec in specs)
    if len({spec.name for spec in specs}) != len(specs):
        raise BadConfig(f"{where}.inputs: two inputs have one name")
    return tuple(Slot(f"{REQUEST}.{spec.name}", spec, -1) for spec in specs)


def _place(
    stage: StageConfig, described: Description, *, config: PipelineConfig, nodes: list[Node], bench: Bench, path: str
) -> Node:
    """The node for one stage; its outputs go to the bench."""
    signature = described.signature
    name = _name(stage, nodes, path)
    slots = connect(signature, stage.inputs, bench, where=path)
    empty = signature.batched and any(slot.maybe_empty for slot in slots)
    unknown = set(stage.outputs) - {spec.name for spec in signature.outputs}
    if unknown:
        raise BadConfig(f"{path}.outputs: the stage has no output {sorted(unknown)}")
    gives = tuple(
        Slot(
            f"{name}.{spec.name}",
            msgspec.structs.replace(spec, name=stage.outputs.get(spec.name, spec.name)),
            len(nodes),
            maybe_empty=empty or (not signature.batched and _may_be_empty(spec)),
        )
        for spec in signature.outputs
    )
    bench.put(gives)
    return Node(
        index=len(nodes),
        name=name,
        config=stage,
        signature=signature,
        max_batch=described.max_batch,
        parameters=described.parameters,
        defaults=_defaults(config, stage, described.parameters, path),
        takes=tuple(slot.key for slot in slots),
        gives=tuple(slot.key for slot in gives),
        after=tuple(sorted({slot.node for slot in slots if slot.node >= 0})),
        checked=all(is_proven(slot.spec, spec) for slot, spec in zip(slots, signature.inputs, strict=True)),
        streams=described.streams,
    )


def _may_be_empty(spec: TensorSpec) -> bool:
    return bool(spec.shape) and isinstance(spec.shape[0], Free) and spec.shape[0].min == 0


def _name(stage: StageConfig, nodes: list[Node], path: str) -> str:
    taken = {REQUEST, *(node.name for node in nodes)}
    if stage.name:
        if stage.name in taken or not stage.name.replace("_", "").replace("-", "").isalnum():
            raise BadConfig(
                f"{path}.name: {stage.name!r} is taken or not a name", hint="letters, digits, _ and -; each name once"
            )
        return stage.name
    source = stage.run.partition(":")[2] or stage.artifact.partition("@")[0] or "remote"
    plain = "".join(letter if letter.isalnum() else "_" for letter in source.rstrip("/").split("/")[-1]).lower()
    return next(name for name in (plain, *(f"{plain}_{i}" for i in range(2, len(nodes) + 4))) if name not in taken)


def _defaults(
    config: PipelineConfig, stage: StageConfig, parameters: tuple[Parameter, ...], path: str
) -> dict[str, Value]:
    known = {parameter.name: parameter for parameter in parameters}
    unknown = set(stage.parameters) - set(known)
    if unknown:
        raise BadConfig(
            f"{path}.parameters: the stage has no parameter {sorted(unknown)}",
            hint=f"it has {', '.join(known) or 'none'}",
        )
    given = {name: value for name, value in config.parameters.items() if name in known} | stage.parameters
    try:
        return {name: known[name].check(value) for name, value in given.items()}
    except BadInput as fault:
        raise BadConfig(f"{path}.parameters: {fault}", hint=fault.hint) from None


def _finish(config: PipelineConfig, nodes: list[Node], bench: Bench, labels: tuple[str, ...], where: str) -> Plan:
    known = {parameter.name for node in nodes for parameter in node.parameters}
    if set(config.parameters) - known:
        raise BadConfig(
            f"{where}.parameters: no stage has {sorted(set(config.parameters) - known)}",
            hint=f"there is {', '.join(sorted(known)) or 'none'}",
        )
    outputs = _outputs(config, bench, where)
    inputs = tuple(slot for slot in bench.by_key.values() if slot.node < 0)
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
        labels=labels,
    )


def _outputs(config: PipelineConfig, bench: Bench, where: str) -> tuple[Slot, ...]:
    if not config.outputs:
        return bench.last
    found = []
    for index, name in enumerate(config.outputs):
        slot = bench.find(name)
        if slot is None:
            raise BadConfig(f"{where}.outputs[{index}]: no stage gives {name!r}", hint=f"there is {bench.names}")
        found.append(slot)
    names = [slot.spec.name for slot in found]
    if len(set(names)) != len(names):
        raise BadConfig(f"{where}.outputs: two outputs have one name ({names})", hint="rename one in its stage")
    return tuple(found)


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
