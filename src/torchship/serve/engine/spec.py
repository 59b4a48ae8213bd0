"""What a line and its workers are told: the limits of a model, where a copy of a stage runs, and what it opens.

A setting is declared here once. `LineLimits` are the keys of a `[[model]]` table too (serve.config extends it), and a
`WorkerSpec` is sent to the worker as it is, so that a new setting needs no other edit before it is used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated

import msgspec

from torchship.pipeline.config import StageConfig
from torchship.tensors import NanPolicy, Signature, TensorSpec, numpy_dtype

_SLOT_LIMIT = 2**28  # bytes; a bigger batch travels in memory of its own
_SLOT_FREE = 2**20  # bytes of a slot for each tensor whose size is not known
_ALIGN = 64
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_OPEN = 120.0  # seconds to open a stage at least
_LOADS = 4.0  # times what was measured

Seconds = Annotated[float, msgspec.Meta(gt=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]


class LineLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What a model's line takes, and how patient it is; times in seconds, sizes in bytes.

    A batch may run for `run_timeout`, or for the time-out of a request in it that asks for longer; 0 is a minute, or
    `timeout` where that is longer. A stage may take `open_timeout` to open; 0 is what was measured, several times over,
    and two minutes at least. `spare`: keep one more process open, which takes over where the only copy is lost; None
    does so on a card with room for it. `nice` lets other models go first where they share cores, `cpus` pins the
    workers to some, and a worker that takes more than `memory` bytes is replaced.
    """

    queue_rows: Count = 4096
    queue_bytes: Count = 2**28
    timeout: Seconds = 60.0
    max_wait: Annotated[float, msgspec.Meta(ge=0, le=10)] = 0.0
    run_timeout: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    open_timeout: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    spare: bool | None = None
    sequence_idle: Seconds = 60.0
    priority: Count = 2
    memory: Annotated[int, msgspec.Meta(ge=0)] = 0
    nice: Annotated[int, msgspec.Meta(ge=0, le=19)] = 0
    cpus: tuple[Annotated[int, msgspec.Meta(ge=0)], ...] = ()
    nan: NanPolicy = "allow"


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """Where one copy runs: its device, the share of the device's memory that it may take (of 1), its threads (0: one
    for each core), the cores that it is pinned to (none: all), and how far it stands back for others."""

    device: str = "cpu"
    memory_share: float = 1.0
    threads: int = 0
    cpus: tuple[int, ...] = ()
    nice: int = 0

    def alone(self, environment: Mapping[str, str]) -> tuple[Placement, dict[str, str]]:
        """This place for a process that sees no card but its own, and what its environment says then.

        Compiled code runs on the first card that a process sees, and CUDA takes half a GB of each that it opens.
        Source: CUDA C++ Programming Guide, "CUDA Environment Variables", CUDA_VISIBLE_DEVICES.
        """
        kind, _, number = self.device.partition(":")
        if kind != "cuda" or not number.isdigit():
            return self, {}
        named = environment.get(_VISIBLE)
        cards = [number] if named is None else [card.strip() for card in named.split(",")][int(number) :]
        if not cards:  # torch says that it is not there
            return self, {}
        return msgspec.structs.replace(self, device="cuda:0"), {_VISIBLE: cards[0]}


class StageModel(msgspec.Struct, frozen=True, kw_only=True):
    """One stage of a plan as a worker opens it; `store` is the folder in which its artifact's name is looked up, and
    `load_s` how long opening was measured to take."""

    name: str
    config: StageConfig
    store: str
    signature: Signature
    max_batch: int
    load_s: float = 0.0

    @property
    def loose(self) -> tuple[int, ...]:
        """The inputs that differ between calls: optional ones, and those of which an axis after the first is free."""
        inputs = enumerate(self.signature.inputs)
        return tuple(
            [at for at, spec in inputs if spec.optional or not all(isinstance(axis, int) for axis in spec.shape[1:])]
        )

    @property
    def fits(self) -> bool:
        """Whether every batch fits into a slot, so that nothing needs to be measured."""
        signature = self.signature
        plain = signature.batched and not self.loose and all(spec.dtype != "BYTES" for spec in signature.inputs)
        return plain and self.slot_sizes[0] < _SLOT_LIMIT

    @property
    def slot_sizes(self) -> tuple[int, int]:
        """Bytes of the input and of the output half of a slot for one batch."""
        signature = self.signature
        return self._slot(signature.inputs), self._slot(signature.outputs)

    def _slot(self, specs: tuple[TensorSpec, ...]) -> int:
        total = 0
        for spec in specs:
            axes = (self.max_batch, *spec.shape[1:]) if self.signature.batched else spec.shape
            fixed = [axis for axis in axes if isinstance(axis, int)]
            known = spec.dtype != "BYTES" and len(fixed) == len(axes)
            size = numpy_dtype(spec.dtype).itemsize * math.prod(fixed) if known else _SLOT_FREE
            total += -(-size // _ALIGN) * _ALIGN
        return min(_SLOT_LIMIT, total)


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """All that one worker is told about itself. `depth` batches are with it at once: one runs, the others wait."""

    model: StageModel
    placement: Placement = Placement()
    limits: LineLimits = LineLimits()
    depth: int = 2

    @property
    def open_timeout(self) -> float:
        """Seconds that the worker may take to open its stage: compilers and cold disks make it vary."""
        return self.limits.open_timeout or max(_OPEN, _LOADS * self.model.load_s)


def placements(config: StageConfig, limits: LineLimits) -> tuple[Placement, ...]:
    """The place of each copy of a stage; where there are several devices, the copies are dealt out to them in turn.

    A Python stage has one thread unless it asks for more: what it calls often starts as many as there are cores.
    """
    threads, share = config.threads or (1 if config.run else 0), config.memory_share or 1.0
    return tuple(
        Placement(device=device, memory_share=share, threads=threads, cpus=limits.cpus, nice=limits.nice)
        for device in config.devices
    )
