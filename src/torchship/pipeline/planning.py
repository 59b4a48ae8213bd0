"""The Plan: a pipeline after its check, ready to be run in one process (Composed) or many (the Line).

Every stage gets its place, its name and its tensors, those of published pipelines inside it too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from torchship.artifact import Store
from torchship.errors import BadConfig, BadInput, TorchshipError
from torchship.pipeline.config import PipelineConfig, StageConfig
from torchship.pipeline.faults import blame
from torchship.pipeline.opening import Description, describe
from torchship.pipeline.wiring import REQUEST, Slots, TensorTable, WiredTensor, connect, is_proven, may_be_empty, relax
from torchship.stage import Parameter, Parameters, Value
from torchship.tensors import Signature, TensorSpec


@dataclass(frozen=True)
class Node:
    """One stage in its place.

    `takes[i]` and `gives[i]` are the slots of input and output i of `signature`, `after` the nodes it waits for,
    `keeps` the slots that must outlive it: they feed later nodes or are outputs of the pipeline. `defaults` are the
    pipeline's values for its `parameters`. The artifact in `config` is a folder. Axis 0 of a row stage's `signature`
    has no upper bound. Where `checked` is false, the taken tensors must be checked at run time. `load_s` is how long
    opening was measured to take, in seconds.
    """

    index: int
    name: str
    config: StageConfig
    signature: Signature
    max_batch: int
    parameters: tuple[Parameter, ...]
    defaults: Parameters
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    after: tuple[int, ...]
    checked: bool
    keeps: tuple[str, ...] = ()
    streams: bool = False
    load_s: float = 0.0


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

    def before(self, node: Node) -> set[int]:
        """The indices of all nodes that must have run before `node`."""
        return set(node.after).union(*(self.before(self.nodes[index]) for index in node.after))


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
    table, outputs = layout.build(config, where=where)
    nodes = layout.nodes
    if any(node.streams for node in nodes[:-1]):
        raise BadConfig(f"{where}.stages: only the last stage may give several answers")
    known = {parameter.name for node in nodes for parameter in node.parameters}
    if set(config.parameters) - known:
        raise BadConfig(
            f"{where}.parameters: no stage has {sorted(set(config.parameters) - known)}",
            hint=f"there is {', '.join(sorted(known)) or 'none'}",
        )
    inputs = _inputs(config, nodes, {slot.key: slot for slot in table.by_key.values() if slot.node < 0}, where)
    keys = tuple(slot.key for slot in outputs)
    placed, made = [], {slot.key for slot in inputs}
    for node in nodes:
        made |= set(node.gives)
        wanted = {key for later in nodes[node.index + 1 :] for key in later.takes} | set(keys)
        placed.append(replace(node, keeps=tuple(sorted(wanted & made))))
    batched = all(node.signature.batched for node in nodes)
    return Plan(
        name=config.name,
        config=config,
        signature=Signature(tuple(s.spec for s in inputs), tuple(s.spec for s in outputs), batched),
        inputs=tuple(slot.key for slot in inputs),
        outputs=keys,
        nodes=tuple(placed),
        parameters=_merge(placed, where),
        labels=layout.labels,
    )


def _inputs(config: PipelineConfig, nodes: list[Node], slots: dict[str, WiredTensor], where: str) -> Slots:
    """The pipeline's inputs, the optional ones last: they are optional for every stage that takes them."""
    needed = {
        key: node.name
        for node in nodes
        for spec, key in zip(node.signature.inputs, node.takes, strict=True)
        if not spec.optional
    }
    wrong = [slot for slot in slots.values() if slot.spec.optional and slot.key in needed]
    if wrong and config.inputs:
        raise BadConfig(
            f"{where}.inputs: {wrong[0].spec} is optional, but stage {needed[wrong[0].key]!r} needs it",
            hint="leave its question mark out",
        )
    always = [replace(slot, spec=msgspec.structs.replace(slot.spec, optional=False)) for slot in wrong]
    found = slots | {slot.key: slot for slot in always}
    return tuple(sorted(found.values(), key=lambda slot: slot.spec.optional))


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
            bounds = {"low": max(lows, default=None), "high": min(highs, default=None)}
            merged[mine.name] = msgspec.structs.replace(known, about=known.about or mine.about, **bounds)
    return tuple(merged.values())


@dataclass
class Layout:
    """What is laid out so far. `describing` finds what a stage takes and gives."""

    store: Store
    describing: Callable[[StageConfig, Store], Description]
    nodes: list[Node] = field(default_factory=list)
    labels: tuple[str, ...] = ()

    def build(
        self, config: PipelineConfig, *, where: str, prefix: str = "", given: Slots | None = None, over: Parameters = {}
    ) -> tuple[TensorTable, Slots]:
        """Place all stages; the tensors at hand afterwards, and those that are the pipeline's outputs.

        `given` are the inputs of a pipeline inside another, `over` the outer one's parameters, `prefix` its name.
        """
        if not config.stages:
            raise BadConfig(f"{where}.stages: a pipeline needs at least one stage")
        table = TensorTable()
        table.put(given or ())
        for index, stage in enumerate(config.stages):
            path = f"{where}.stages[{index}]"
            try:
                described = self.describing(stage, self.store)
            except TorchshipError as fault:
                raise blame(fault, where=path) from None
            signature = relax(described.signature)
            if not index and given is None:
                table.put(_request(config, signature, where))
            # an optional input is never guessed: without a tensor of its name it is always absent
            signature = signature.taking({*stage.inputs, *table.by_name})
            described = msgspec.structs.replace(described, signature=signature)
            name = prefix + _name(stage, [node.name.removeprefix(prefix) for node in self.nodes], path)
            slots = connect(signature, stage.inputs, table, where=path)
            values = {**config.parameters, **stage.parameters, **over}
            if described.pipeline is None:
                made = self._place(stage, described, slots, name=name, path=path, values=values)
            else:
                outer = prefix if len(config.stages) == 1 else f"{name}."
                fed = tuple(slot.named(spec.name) for slot, spec in zip(slots, signature.inputs, strict=True))
                made = self._inside(stage, described.pipeline, fed, prefix=outer, path=path, values=values)
            table.put(_renamed(made, stage, path), stage=name)
            self.labels = described.labels or self.labels
        return table, _outputs(config, table, where)

    def _inside(
        self, stage: StageConfig, inner: PipelineConfig, given: Slots, *, prefix: str, path: str, values: Parameters
    ) -> Slots:
        """The outputs of a published pipeline, whose stages take the place of this one."""
        inner = msgspec.structs.replace(inner, stages=tuple(_as_asked(part, stage) for part in inner.stages))
        before = len(self.nodes)
        _, made = self.build(inner, where=f"{path}.pipeline", prefix=prefix, given=given, over=values)
        known = {parameter.name for node in self.nodes[before:] for parameter in node.parameters}
        _refuse_unknown(stage.parameters, known, path)
        return made

    def _place(
        self, stage: StageConfig, described: Description, slots: Slots, *, name: str, path: str, values: Parameters
    ) -> Slots:
        """The outputs of one stage, after its node has been added."""
        signature, index = described.signature, len(self.nodes)
        if described.takes_labels and self.labels and "labels" not in stage.options:
            stage = msgspec.structs.replace(stage, options={**stage.options, "labels": list(self.labels)})
        if stage.artifact:  # its folder: whoever opens it later opens the same version
            stage = msgspec.structs.replace(stage, artifact=str(self.store.resolve(stage.artifact).absolute()))
        empty = signature.batched and any(slot.maybe_empty for slot in slots)
        made = [(spec, empty or (not signature.batched and may_be_empty(spec))) for spec in signature.outputs]
        gives = tuple(WiredTensor(f"{name}.{spec.name}", spec, index, none) for spec, none in made)
        node = Node(
            index=index,
            name=name,
            config=stage,
            signature=signature,
            max_batch=described.max_batch,
            parameters=described.parameters,
            defaults=_defaults(described, values, named=stage.parameters, path=path),
            takes=tuple(slot.key for slot in slots),
            gives=tuple(slot.key for slot in gives),
            after=tuple(sorted({slot.node for slot in slots if slot.node >= 0})),
            checked=all(is_proven(slot.spec, spec) for slot, spec in zip(slots, signature.inputs, strict=True)),
            streams=described.streams,
            load_s=described.load_s,
        )
        self.nodes.append(node)
        return gives


def _as_asked(part: StageConfig, stage: StageConfig) -> StageConfig:
    """A stage of a published pipeline with the copies and the places that the stage which names it asks for."""
    asked: dict[str, Any] = {"copies": stage.copies} if stage.copies != 1 else {}
    if part.artifact:
        asked |= {"device": stage.device} if stage.device != "cpu" else {}
        asked |= {"threads": stage.threads} if stage.threads else {}
        asked |= {"memory_share": stage.memory_share} if stage.memory_share else {}
    return msgspec.structs.replace(part, **asked)


def _renamed(made: Slots, stage: StageConfig, path: str) -> Slots:
    unknown = set(stage.outputs) - {slot.spec.name for slot in made}
    if unknown:
        raise BadConfig(f"{path}.outputs: the stage has no output {sorted(unknown)}")
    return tuple(slot.named(stage.outputs.get(slot.spec.name, slot.spec.name)) for slot in made)


def _request(config: PipelineConfig, first: Signature, where: str) -> Slots:
    """The tensors of a request: as the pipeline declares them, else what the first stage takes."""
    renamed = config.stages[0].inputs
    specs = [msgspec.structs.replace(spec, name=renamed.get(spec.name, spec.name)) for spec in first.inputs]
    if config.inputs:
        try:
            specs = list(map(TensorSpec.parse, config.inputs))
        except BadConfig as fault:
            raise blame(fault, where=f"{where}.inputs") from None
    if len({spec.name for spec in specs}) != len(specs):
        raise BadConfig(f"{where}.inputs: two inputs have one name")
    return tuple(WiredTensor(f"{REQUEST}.{spec.name}", spec, -1, may_be_empty(spec)) for spec in specs)


def _name(stage: StageConfig, names: list[str], path: str) -> str:
    taken = {REQUEST, *names}
    if stage.name:
        if stage.name in taken or not stage.name.replace("_", "").replace("-", "").isalnum():
            raise BadConfig(
                f"{path}.name: {stage.name!r} is taken or not a name", hint="letters, digits, _ and -; each name once"
            )
        return stage.name
    source = stage.run.partition(":")[2] or stage.artifact.partition("@")[0] or "remote"
    plain = "".join(letter if letter.isalnum() else "_" for letter in source.rstrip("/").split("/")[-1]).lower()
    return next(name for name in (plain, *(f"{plain}_{i}" for i in range(2, len(names) + 4))) if name not in taken)


def _defaults(described: Description, values: Parameters, *, named: Parameters, path: str) -> dict[str, Value]:
    """The pipeline's values for the parameters of a stage, checked; it has all that are `named` for it."""
    known = {parameter.name: parameter for parameter in described.parameters}
    _refuse_unknown(named, set(known), path)
    try:
        return {name: known[name].check(value) for name, value in values.items() if name in known}
    except BadInput as fault:
        raise BadConfig(f"{path}.parameters: {fault}", hint=fault.hint) from None


def _refuse_unknown(given: Parameters, known: set[str], path: str) -> None:
    unknown = sorted(set(given) - known)
    if unknown:
        hint = f"it has {', '.join(sorted(known)) or 'none'}"
        raise BadConfig(f"{path}.parameters: the stage has no parameter {unknown}", hint=hint)


def _outputs(config: PipelineConfig, table: TensorTable, where: str) -> Slots:
    """The slots of the pipeline's outputs: as it declares them, else what the last stage gives."""
    if not config.outputs:
        return table.last
    found = []
    for index, name in enumerate(config.outputs):
        slot = table.find(name)
        if slot is None:
            raise BadConfig(f"{where}.outputs[{index}]: no stage gives {name!r}", hint=f"there is {table.names}")
        if slot.spec.optional:
            text = f"{where}.outputs[{index}]: {name!r} is an optional input, which may not be there"
            raise BadConfig(text, hint="declare it in inputs without a question mark, or leave it out here")
        found.append(slot)
    names = [slot.spec.name for slot in found]
    if len(set(names)) != len(names):
        raise BadConfig(f"{where}.outputs: two outputs have one name ({names})", hint="rename one in its stage")
    return tuple(found)
