"""Request and Response, which every protocol decodes into and encodes from, and the tensors that they carry.

Bytes become arrays only where somebody looks at them: `RawInputs` came in with a request, `BatchSlice` is one caller's
part of a batch that came back. Both are Tensors like any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from torchship.stage import Value
from torchship.tensors import Array, Tensors
from torchship.wire.json_arrays import encode_json_data
from torchship.wire.raw import LONG

_KEPT = 512


class WantedOutput(msgspec.Struct):
    """One output that the caller names: `binary` is its encoding, `classification` asks for the top k classes, which
    the server gives the names in `labels`."""

    name: str
    binary: bool = False
    classification: int = 0
    parameters: dict[str, Value] = {}
    labels: Sequence[str] = ()


class Request(msgspec.Struct):
    """One inference request. `deadline` counts from arrival in seconds (0: the model's own); an empty version means
    the current one; an empty `outputs` means all of them, in binary where `binary` says so."""

    model: str
    inputs: Tensors
    version: str = ""
    id: str = ""
    parameters: dict[str, Value] = {}
    outputs: tuple[WantedOutput, ...] = ()
    deadline: float = 0.0
    priority: int = 0
    headers: dict[str, str] = {}
    binary: bool = False


class Response(msgspec.Struct):
    """One answer to a Request. `trace` is the W3C traceparent of the span that it was made in, if there is one."""

    model: str
    version: str
    outputs: Tensors
    id: str = ""
    parameters: dict[str, Any] = {}
    trace: str = ""


class RawLayout(msgspec.Struct, eq=False):
    """What a request says beside its data; one for all requests that say the same.

    `sizes` are the bytes of each input.
    `passed` is whoever has checked these names, dtypes and shapes, `rows` and `size` (bytes) what it measured then;
    `usable`: it takes the bytes as they are.
    """

    names: tuple[str, ...]
    dtypes: tuple[np.dtype[Any], ...]
    shapes: tuple[tuple[int, ...], ...]
    sizes: list[int]
    passed: object = None
    rows: int = 0
    size: int = 0
    usable: bool = False


def layout_of(inputs: Tensors) -> RawLayout:
    """The layout of a request with these inputs."""
    arrays = list(inputs.values())
    dtypes, shapes = tuple([array.dtype for array in arrays]), tuple([array.shape for array in arrays])
    return RawLayout(tuple(inputs), dtypes, shapes, [array.nbytes for array in arrays])


class RawInputs(Mapping[str, Array]):
    """The inputs of a request as their bytes, in the order of the layout's names."""

    __slots__ = ("layout", "raws")

    def __init__(self, layout: RawLayout, raws: tuple[bytes, ...]) -> None:
        self.layout = layout
        self.raws = raws

    def __getitem__(self, name: str) -> Array:
        layout = self.layout
        try:
            index = layout.names.index(name)
        except ValueError:
            raise KeyError(name) from None
        return np.frombuffer(self.raws[index], layout.dtypes[index]).reshape(layout.shapes[index])

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout.names)

    def __len__(self) -> int:
        return len(self.layout.names)


class Outline(msgspec.Struct, eq=False):
    """What the answers of a line have in common: the names of the outputs, and what encoders remember about them."""

    names: tuple[str, ...]
    told: dict[Any, Any] = {}

    def keep(self, key: Any, value: Any) -> None:
        """Keep something in `told`; all is forgotten when it is too much."""
        if len(self.told) >= _KEPT:
            self.told.clear()
        self.told[key] = value


class Batch:
    """What a stage made of many callers' rows; axis 0 of every array holds them.

    `plain`: the rows are numbers, which can be cut as text and as bytes; `long`: too many to be written as text at
    once. `bodies` is for whoever can write the answers to all callers at once.
    """

    __slots__ = ("_raws", "_texts", "arrays", "bodies", "long", "outline", "plain")

    def __init__(self, outline: Outline, arrays: list[Array]) -> None:
        self.outline = outline
        self.arrays = arrays
        self.plain = not any(array.dtype.hasobject for array in arrays)
        self.long = sum([array.nbytes for array in arrays]) > LONG
        self.bodies: tuple[str, str, list[bytes]] | None = None
        self._texts: list[list[bytes]] | None = None
        self._raws: list[tuple[bytes, int]] | None = None

    @property
    def texts(self) -> list[list[bytes]]:
        """Each output's rows as JSON, without the brackets around a row; made at once for all callers."""
        if self._texts is None:
            self._texts = [_texts(array) for array in self.arrays]
        return self._texts

    @property
    def raws(self) -> list[tuple[bytes, int]]:
        """Each output's bytes, and how many of them make a row."""
        if self._raws is None:
            self._raws = [(array.tobytes(), array.nbytes // len(array)) for array in self.arrays]
        return self._raws


def _texts(array: Array) -> list[bytes]:
    rows = array.reshape(len(array), -1)
    text = msgspec.json.encode(rows.tolist())
    if b"null" in text:  # not a number, or infinite
        text = msgspec.json.encode([encode_json_data(row) for row in rows])
    return text[2:-2].split(b"],[")


class BatchSlice(Mapping[str, Array]):
    """One caller's rows of a batch."""

    __slots__ = ("batch", "end", "start")

    def __init__(self, batch: Batch, start: int, end: int) -> None:
        self.batch = batch
        self.start = start
        self.end = end

    def __getitem__(self, name: str) -> Array:
        try:
            index = self.batch.outline.names.index(name)
        except ValueError:
            raise KeyError(name) from None
        return self.batch.arrays[index][self.start : self.end]

    def __iter__(self) -> Iterator[str]:
        return iter(self.batch.outline.names)

    def __len__(self) -> int:
        return len(self.batch.outline.names)
