"""Lays a pipeline out: every stage gets its place, its name and its tensors, those of published pipelines too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from torchship.artifact import Store
from torchship.errors import BadConfig, BadInput, TorchshipError
from torchship.pipeline.config import PipelineConfig, StageConfig
from torchship.pipeline.describe import Description, blame
from torchship.pipeline.wiring import REQUEST, Bench, Slot, connect, is_proven, relax
from torchship.stage import Parameter, Value
from torchship.tensors import Free, Signature, TensorSpec


@dataclass(frozen=True)
class Node:
    """One stage in its place.

    `takes[i]` and `gives[i]` are the slots of input and output i of `signature`, `after` the nodes it waits for,
    `keeps` the slots that must outlive it: they feed later nodes or are outputs of the pipeline. `defaults` are the
    pipeline's values for its `parameters`. The artifact in `config` is a folder. Axis 0 of a row stage's `signature`
    has no upper bound. Where `checked` is false, the taken tensors must be checked at run time.
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
class _Site:
    """A stage on its way to its place: what it is, the tensors it takes, and the parameters of what is around it."""

    stage: StageConfig
    described: Description
    slots: tuple[Slot, ...]
    name: str
    path: str
    pipeline: Mapping[str, Value]
    over: Mapping[str, Value]


@dataclass
class Layout:
    """What is laid out so far. `describing` finds what a stage takes and gives."""

    store: Store
    describing: Callable[[StageConfig, Store], Description]
    nodes: list[Node] = field(default_factory=list)
    labels: tuple[str, ...] = ()

    def lay(
        self,
        config: PipelineConfig,
        *,
        where: str,
        prefix: str = "",
        given: tuple[Slot, ...] = (),
        over: Mapping[str, Value] = {},
    ) -> tuple[Bench, tuple[Slot, ...]]:
        """Place all stages; the tensors at hand afterwards, and those that are the pipeline's outputs.

        `given` are the inputs of a pipeline inside another, `over` the outer one's parameters, `prefix` its name.
        """
        if not config.stages:
            raise BadConfig(f"{where}.stages: a pipeline needs at least one stage")
        bench = Bench()
        bench.put(given)
        for index, stage in enumerate(config.stages):
            path = f"{where}.stages[{index}]"
            described = self._describe(stage, path)
            if not index and not given:
                bench.put(request(config, described.signature, where))
            name = prefix + _name(stage, [node.name.removeprefix(prefix) for node in self.nodes], path)
            slots = connect(described.signature, stage.inputs, bench, where=path)
            site = _Site(stage, described, slots, name, path, config.parameters, over)
            if described.pipeline is not None:
                alone = len(config.stages) == 1
                made = self._inside(site, described.pipeline, prefix=prefix if alone else f"{name}.")
            else:
                made = self._place(site)
            bench.put(_renamed(made, stage, path), stage=name)
            self.labels = described.labels or self.labels
        return bench, outputs(config, bench, where)

    def _describe(self, stage: StageConfig, path: str) -> Description:
        try:
            found = self.describing(stage, self.store)
        except TorchshipError as fault:
            raise blame(fault, where=path) from None
        return msgspec.structs.replace(found, signature=relax(found.signature))

    def _pinned(self, stage: StageConfig) -> StageConfig:
        """The folder for the name of an artifact: whoever opens it later opens the same version."""
        if not stage.artifact:
            return stage
        return msgspec.structs.replace(stage, artifact=str(self.store.resolve(stage.artifact).absolute()))

    def _inside(self, site: _Site, inner: PipelineConfig, *, prefix: str) -> tuple[Slot, ...]:
        """The outputs of a published pipeline, whose stages take the place of this one."""
        stage = site.stage
        given = tuple(
            replace(slot, spec=msgspec.structs.replace(slot.spec, name=spec.name))
            for slot, spec in zip(site.slots, site.described.signature.inputs, strict=True)
        )
        before = len(self.nodes)
        _, made = self.lay(
            msgspec.structs.replace(inner, stages=tuple(_as_asked(part, stage) for part in inner.stages)),
            where=f"{site.path}.pipeline",
            prefix=prefix,
            given=given,
            over={**site.pipeline, **stage.parameters, **site.over},
        )
        known = {parameter.name for node in self.nodes[before:] for parameter in node.parameters}
        _refuse_unknown(stage.parameters, known, site.path)
        return made

    def _place(self, site: _Site) -> tuple[Slot, ...]:
        """The outputs of one stage, after its node has been added."""
        stage, described, slots = site.stage, site.described, site.slots
        signature = described.signature
        empty = signature.batched and any(slot.maybe_empty for slot in slots)
        index = len(self.nodes)
        gives = tuple(
            Slot(f"{site.name}.{spec.name}", spec, index, empty or (not signature.batched and _may_be_empty(spec)))
            for spec in signature.outputs
        )
        node = Node(
            index=index,
            name=site.name,
            config=self._pinned(_with_labels(stage, described, self.labels)),
            signature=signature,
            max_batch=described.max_batch,
            parameters=described.parameters,
            defaults=_defaults(site),
            takes=tuple(slot.key for slot in slots),
            gives=tuple(slot.key for slot in gives),
            after=tuple(sorted({slot.node for slot in slots if slot.node >= 0})),
            checked=all(is_proven(slot.spec, spec) for slot, spec in zip(slots, signature.inputs, strict=True)),
            streams=described.streams,
        )
        self.nodes.append(node)
        return gives


def _as_asked(part: StageConfig, stage: StageConfig) -> StageConfig:
    """A stage of a published pipeline with the copies, device and threads that the stage which names it asks for."""
    asked: dict[str, Any] = {"copies": stage.copies} if stage.copies != 1 else {}
    if part.artifact:
        asked |= {"device": stage.device} if stage.device != "cpu" else {}
        asked |= {"threads": stage.threads} if stage.threads else {}
    return msgspec.structs.replace(part, **asked)


def _renamed(made: tuple[Slot, ...], stage: StageConfig, path: str) -> tuple[Slot, ...]:
    unknown = set(stage.outputs) - {slot.spec.name for slot in made}
    if unknown:
        raise BadConfig(f"{path}.outputs: the stage has no output {sorted(unknown)}")
    return tuple(
        replace(slot, spec=msgspec.structs.replace(slot.spec, name=stage.outputs.get(slot.spec.name, slot.spec.name)))
        for slot in made
    )


def _with_labels(stage: StageConfig, described: Description, labels: tuple[str, ...]) -> StageConfig:
    if not described.takes_labels or not labels or "labels" in stage.options:
        return stage
    return msgspec.structs.replace(stage, options={**stage.options, "labels": list(labels)})


def request(config: PipelineConfig, first: Signature, where: str) -> tuple[Slot, ...]:
    """The tensors of a request: as the pipeline declares them, else what the first stage takes."""
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
    return tuple(Slot(f"{REQUEST}.{spec.name}", spec, -1, _may_be_empty(spec)) for spec in specs)


def _may_be_empty(spec: TensorSpec) -> bool:
    return bool(spec.shape) and isinstance(spec.shape[0], Free) and spec.shape[0].min == 0


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


def _defaults(site: _Site) -> dict[str, Value]:
    """The pipeline's values for the parameters of a stage, checked."""
    known = {parameter.name: parameter for parameter in site.described.parameters}
    _refuse_unknown(site.stage.parameters, set(known), site.path)
    given = {**site.pipeline, **site.stage.parameters, **site.over}
    try:
        return {name: known[name].check(value) for name, value in given.items() if name in known}
    except BadInput as fault:
        raise BadConfig(f"{site.path}.parameters: {fault}", hint=fault.hint) from None


def _refuse_unknown(given: Mapping[str, Value], known: set[str], path: str) -> None:
    unknown = sorted(set(given) - known)
    if unknown:
        hint = f"it has {', '.join(sorted(known)) or 'none'}"
        raise BadConfig(f"{path}.parameters: the stage has no parameter {unknown}", hint=hint)


def outputs(config: PipelineConfig, bench: Bench, where: str) -> tuple[Slot, ...]:
    """The slots of the pipeline's outputs: as it declares them, else what the last stage gives."""
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
