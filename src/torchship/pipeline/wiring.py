"""Which tensor goes where: finds the earlier tensor that feeds each input of a stage, and checks that it fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import msgspec

from torchship.errors import BadConfig
from torchship.tensors import Axis, Free, Signature, TensorSpec

REQUEST = "request"


@dataclass(frozen=True)
class WiredTensor:
    """One tensor on its way through the pipeline: `key` is unique, `spec` is named as later stages find it.

    `node` is the index of the stage that gives it, -1 for the request. `maybe_empty`: it may have no rows.
    """

    key: str
    spec: TensorSpec
    node: int
    maybe_empty: bool = False

    def named(self, name: str) -> WiredTensor:
        """The same under another name."""
        return replace(self, spec=msgspec.structs.replace(self.spec, name=name))


Slots: TypeAlias = tuple[WiredTensor, ...]


@dataclass
class TensorTable:
    """The tensors at hand at some point of the pipeline, the latest of each name first in reach."""

    by_name: dict[str, WiredTensor] = field(default_factory=dict)
    by_key: dict[str, WiredTensor] = field(default_factory=dict)
    last: Slots = ()

    def put(self, slots: Slots, *, stage: str = "") -> None:
        """Take in what a stage gives."""
        for slot in slots:
            self.by_name[slot.spec.name] = slot
            self.by_key[slot.key] = slot
            self.by_key.setdefault(f"{stage}.{slot.spec.name}", slot)
        self.last = slots

    def find(self, name: str) -> WiredTensor | None:
        """A tensor by `name` or by `stage.name`."""
        return self.by_key.get(name) or self.by_name.get(name)

    @property
    def names(self) -> str:
        """What there is, for messages."""
        return ", ".join(self.by_name) or "nothing"


def connect(signature: Signature, given: Mapping[str, str], table: TensorTable, *, where: str) -> Slots:
    """The slot for every input of `signature`.

    An input takes the tensor that `given` names for it, else the latest tensor of its own name, datatype and rank;
    else the only output of the stage before that has its datatype and rank. Raises BadConfig naming input and
    candidates.
    """
    unknown = set(given) - {spec.name for spec in signature.inputs}
    if unknown:
        raise BadConfig(
            f"{where}.inputs: the stage has no input {sorted(unknown)}",
            hint=f"its inputs are {', '.join(spec.name for spec in signature.inputs)}",
        )
    named = {spec.name: slot for spec in signature.inputs if (slot := _named(spec, given, table, where))}
    slots: list[WiredTensor] = []
    for spec in signature.inputs:
        slot = named.get(spec.name) or _guess(spec, table, {one.key for one in (*named.values(), *slots)}, where)
        slots.append(slot)
        fault = misfit(slot.spec, spec)
        if fault:
            raise BadConfig(
                f"{where}.inputs: {spec} cannot take {slot.key} ({slot.spec}): {fault}",
                hint="put a stage between them, or change one of the two",
            )
        # a job stage must say that it takes no rows where there may be none; row stages are then not called
        if slot.maybe_empty and not (signature.batched or not spec.shape or may_be_empty(spec)):
            raise BadConfig(
                f"{where}.inputs: {slot.key} may have no rows, {spec} needs at least one",
                hint=f"declare its first axis 0.. as in {spec.name}:{spec.dtype}[0..,...], and mean it",
            )
    return tuple(slots)


def _named(spec: TensorSpec, given: Mapping[str, str], table: TensorTable, where: str) -> WiredTensor | None:
    if spec.name not in given:
        own = table.by_name.get(spec.name)
        return own if own and _is_alike(own.spec, spec) else None
    found = table.find(given[spec.name])
    if found is None:
        raise BadConfig(
            f"{where}.inputs.{spec.name}: no earlier stage gives {given[spec.name]!r}", hint=f"there is {table.names}"
        )
    return found


def _guess(spec: TensorSpec, table: TensorTable, taken: set[str], where: str) -> WiredTensor:
    fits = [slot for slot in table.last if slot.key not in taken and _is_alike(slot.spec, spec)]
    if len(fits) == 1:
        return fits[0]
    found = f"{len(fits)} outputs of the stage before fit" if fits else "no output of the stage before fits"
    raise BadConfig(
        f"{where}.inputs: nothing alike is named {spec.name!r} and {found} ({spec}); at hand: "
        + (", ".join(str(slot.spec) for slot in table.by_name.values()) or "nothing"),
        hint=f'say which: inputs = {{{spec.name} = "..."}}',
    )


def _is_alike(given: TensorSpec, taken: TensorSpec) -> bool:
    return given.dtype == taken.dtype and len(given.shape) == len(taken.shape)


def may_be_empty(spec: TensorSpec) -> bool:
    """Whether a tensor of `spec` may have no rows."""
    return bool(spec.shape) and isinstance(spec.shape[0], Free) and spec.shape[0].min == 0


def misfit(given: TensorSpec, taken: TensorSpec) -> str:
    """Why a tensor of spec `given` can never be taken as `taken`; empty when it can."""
    if given.dtype != taken.dtype:
        return f"{given.dtype} is not {taken.dtype}"
    if len(given.shape) != len(taken.shape):
        return f"{len(given.shape)} axes are not {len(taken.shape)}"
    for position, (has, wants) in enumerate(zip(given.shape, taken.shape, strict=True)):
        (low, high), (least, most) = _span(has), _span(wants)
        if low > most or high < least:
            return f"axis {position} is {has}, expected {wants}"
    return ""


def is_proven(given: TensorSpec, taken: TensorSpec) -> bool:
    """Whether every tensor of spec `given` fits `taken`, so that it need not be checked again."""
    return _is_alike(given, taken) and all(
        _span(wants)[0] <= _span(has)[0] and _span(has)[1] <= _span(wants)[1] and not getattr(wants, "name", "")
        for has, wants in zip(given.shape, taken.shape, strict=True)
    )


def relax(signature: Signature) -> Signature:
    """The signature of a row stage for any number of rows: it runs in chunks where a job has more than it takes."""
    if not signature.batched:
        return signature
    return Signature(tuple(map(_relaxed, signature.inputs)), tuple(map(_relaxed, signature.outputs)), batched=True)


def _relaxed(spec: TensorSpec) -> TensorSpec:
    if not spec.shape or (spec.shape[0] not in (1,) and isinstance(spec.shape[0], int)):
        return spec
    first = spec.shape[0]
    rows = Free(first.min, None, first.name) if isinstance(first, Free) else Free()
    return msgspec.structs.replace(spec, shape=(rows, *spec.shape[1:]))


def _span(axis: Axis) -> tuple[float, float]:
    if isinstance(axis, int):
        return axis, axis
    return axis.min, float("inf") if axis.max is None else axis.max
