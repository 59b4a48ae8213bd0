"""What the host and a worker say to each other: msgpack messages over a private Unix seqpacket socket.

Tensors never travel here; a message says where they lie in shared memory. Nothing is pickled and nothing is typed
loosely: what does not decode is a fault of the worker that sent it.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from torchship.pipeline.faults import Fault
from torchship.serve.engine.ipc.arena import ArenaBlock
from torchship.stage import Value


class PackedCall(msgspec.Struct, array_like=True, frozen=True):
    """One call of the stage: rows of each job in it, the tensors in the order of the inputs, the request's values.

    An optional input that the jobs do not bring has None for its block.
    """

    rows: list[int]
    blocks: list[ArenaBlock | None]
    values: dict[str, Value] = {}
    stream: bool = False


class RunBatch(msgspec.Struct, array_like=True, frozen=True, tag=1):
    """Host to worker: run these calls; the tensors lie in `slot`, or in the memory that comes along."""

    number: int
    slot: int
    calls: list[PackedCall]


class Ping(msgspec.Struct, array_like=True, frozen=True, tag=2):
    """Host to worker: are you there?"""

    number: int


class Stop(msgspec.Struct, array_like=True, frozen=True, tag=3):
    """Host to worker: close the stage and leave."""


class Taken(msgspec.Struct, array_like=True, frozen=True, tag=4):
    """Host to worker: the caller has taken one more answer of the stream `number`."""

    number: int


class Drop(msgspec.Struct, array_like=True, frozen=True, tag=5):
    """Host to worker: nobody waits for the rest of the stream `number`."""

    number: int


class Result(msgspec.Struct, array_like=True, frozen=True):
    """Answers of neighbouring jobs: from job `first` on, `rows[i]` rows for each, the outputs in their order."""

    first: int
    rows: list[int]
    blocks: list[ArenaBlock]


class BatchDone(msgspec.Struct, array_like=True, frozen=True, tag=1):
    """Worker to host: what became of a RunBatch; `more` announces further answers of a stream, `last` that the process
    ends: what waits behind has not run.

    `began` and `ended` are nanoseconds of the system's monotonic clock, which all processes share.
    """

    number: int
    began: int
    ended: int
    results: list[Result]
    faults: list[Fault] = []
    more: bool = False
    last: bool = False


class Pong(msgspec.Struct, array_like=True, frozen=True, tag=2):
    """Worker to host: I am here."""

    number: int


class CardMemory(msgspec.Struct, array_like=True, frozen=True):
    """Bytes of a card when a stage had opened there: what its process held, what was free, and all."""

    held: int
    free: int
    total: int

    def holds_another(self, *, share: float) -> bool:
        """Whether what is free holds two more like it, one of them for a reload, and this share of the card two."""
        return 2 * self.held <= min(self.free, share * self.total)


class Opened(msgspec.Struct, array_like=True, frozen=True, tag=3):
    """Worker to host: the stage is open and warm, on a `card` where it has one. `signature` is its own, as text, to be
    compared."""

    signature: str
    card: CardMemory | None = None


class OpenFailed(msgspec.Struct, array_like=True, frozen=True, tag=4):
    """Worker to host: the stage could not be opened."""

    fault: Fault


Order: TypeAlias = RunBatch | Ping | Stop | Taken | Drop
Report: TypeAlias = BatchDone | Pong | Opened | OpenFailed

encode = msgspec.msgpack.Encoder().encode
decode_order = msgspec.msgpack.Decoder(Order).decode
decode_report = msgspec.msgpack.Decoder(Report).decode
