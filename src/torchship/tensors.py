"""Tensors, the one currency, and the Signature that says which tensors a stage takes and gives.

Data types are spelt as in the Open Inference Protocol (FP32, BF16, INT8, BYTES ...).
Axis 0 of every tensor of a *batched* signature holds the rows.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from torchship.errors import BadConfig, BadInput

Array: TypeAlias = NDArray[Any]
Tensors: TypeAlias = Mapping[str, Array]
NanPolicy: TypeAlias = Literal["allow", "refuse"]

_NUMPY: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    "BYTES": np.dtype(np.object_),
}
DTYPES = (*_NUMPY, "BF16")
FLOATS = ("FP16", "BF16", "FP32", "FP64")
_NAMES = {kind: name for name, kind in _NUMPY.items()}


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype of a wire dtype. BF16 is `ml_dtypes.bfloat16`, BYTES is `object` (of `bytes`).

    Raises BadInput for a name that is not one of `DTYPES`.
    """
    if name == "BF16":
        import ml_dtypes  # only models that speak BF16 pay for the import

        found: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return found
    try:
        return _NUMPY[name]
    except KeyError:
        raise BadInput(f"unknown datatype {name!r}", hint=f"use one of {', '.join(DTYPES)}") from None


def dtype_name(dtype: np.dtype[Any]) -> str:
    """The wire name of a numpy dtype (`str` and `bytes` arrays are BYTES). Raises BadInput for others."""
    known = _NAMES.get(dtype)  # first: asking numpy for kind and name costs microseconds
    if known is not None:
        return known
    if dtype.kind in "SU":
        return "BYTES"
    if dtype.name == "bfloat16":
        return "BF16"
    try:
        return _NAMES[dtype.newbyteorder("=")]
    except KeyError:
        raise BadInput(f"dtype {dtype} has no wire datatype", hint=f"use one of {', '.join(DTYPES)}") from None


def as_bytes(item: object) -> bytes:
    """One element of a BYTES tensor. Raises BadInput for what is neither bytes nor text."""
    if isinstance(item, bytes):
        return item
    if isinstance(item, str):
        try:
            return item.encode()
        except UnicodeEncodeError as fault:
            raise BadInput(f"a BYTES element is no text: {fault}", hint="surrogates cannot be encoded") from None
    if isinstance(item, bytearray | memoryview):
        return bytes(item)
    raise BadInput(f"a BYTES element is {type(item).__name__}", hint="use bytes or str")


def bytes_array(items: Sequence[Any]) -> Array:
    """A one-dimensional BYTES tensor. One by one: numpy would cut trailing zeros off, and make rows of nested lists."""
    array = np.empty(len(items), np.object_)
    array[:] = items
    return array


def as_array(value: Any) -> Array:
    """What callers give for a tensor (nested lists, numbers, bytes, arrays of other libraries) as an array.

    Raises BadInput for a masked array: what is under its mask is no value. numpy.ma, 5 MiB, is loaded for these only.
    """
    if type(value) is not np.ndarray and isinstance(value, np.ndarray) and np.ma.is_masked(value):
        raise BadInput("a masked array has elements without a value", hint="give array.filled(value)")
    array = np.asarray(value)
    if array.dtype.kind in "SU" and not isinstance(value, np.ndarray):
        return np.asarray(value, np.object_)  # an array of fixed width would lose trailing zeros
    return array


def plain(array: Array) -> Array:
    """`array` as the wire, shared memory and engines take it: native byte order, BYTES as an object array of `bytes`.

    Raises BadInput for an element that is neither bytes nor text.
    """
    if array.dtype.kind in "OSU":
        items = array.ravel().tolist()
        if array.dtype.kind == "O" and all(type(item) is bytes for item in items):
            return array
        return bytes_array([as_bytes(item) for item in items]).reshape(array.shape)
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


class Free(msgspec.Struct, frozen=True, array_like=True):
    """An axis of varying length: `min` to `max` (None: unbounded). Axes with one `name` are equally long in a call."""

    min: int = 1
    max: int | None = None
    name: str = ""

    def __str__(self) -> str:
        span = "" if (self.min, self.max) == (1, None) else f"{self.min}..{'' if self.max is None else self.max}"
        return ":".join(part for part in (self.name, span) if part) or "-1"


Axis: TypeAlias = int | Free

_SPEC = re.compile(
    r"^\s*(?P<name>[A-Za-z_][\w.\-]*)(?P<optional>\??)\s*:\s*(?P<dtype>[A-Z0-9]+)\s*\[(?P<axes>[^\]]*)\]\s*$"
)
_AXIS = re.compile(r"^(?:(?P<name>[A-Za-z_]\w*)(?::|$))?(?:(?P<min>\d+)\.\.(?P<max>\d*))?$")


def _parse_axis(text: str, spec: str) -> Axis:
    text = text.strip()
    if text == "-1":
        return Free()
    if text.isdigit():
        return int(text)
    found = _AXIS.match(text)
    if not text or not found:
        raise BadConfig(
            f"{spec!r}: {text!r} is not an axis", hint="an axis is 224, -1, 1..64, a name (seq), or both (seq:1..512)"
        )
    low, high = found["min"], found["max"]
    axis = Free(int(low) if low else 1, int(high) if high else None, found["name"] or "")
    if axis.max is not None and axis.max < axis.min:
        raise BadConfig(f"{spec!r}: axis {text!r} ends before it begins", hint="write the smaller length first")
    return axis


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Name, datatype and shape of one tensor; an axis is a length or Free. A call may leave an `optional` input out."""

    name: str
    dtype: str
    shape: tuple[Axis, ...]
    optional: bool = False

    @classmethod
    def parse(cls, text: str) -> TensorSpec:
        """Read `name:DTYPE[axis,axis,...]`, as in `image:FP32[-1,3,224,224]` or `ids:INT64[batch,seq:1..512]`.

        A question mark behind the name makes it optional, as in `mask?:BOOL[-1,seq]`. Raises BadConfig naming the part
        that is wrong.
        """
        found = _SPEC.match(text)
        if not found:
            raise BadConfig(
                f"{text!r} is not a tensor", hint='write name:DTYPE[axes], as in "image:FP32[-1,3,224,224]"'
            )
        if found["dtype"] not in DTYPES:
            raise BadConfig(f"{text!r}: unknown datatype {found['dtype']}", hint=f"use one of {', '.join(DTYPES)}")
        axes = found["axes"].strip()
        shape = tuple(_parse_axis(axis, text) for axis in axes.split(",")) if axes else ()
        return cls(found["name"], found["dtype"], shape, bool(found["optional"]))

    def __str__(self) -> str:
        return f"{self.name}{'?' * self.optional}:{self.dtype}[{','.join(map(str, self.shape))}]"

    @property
    def wire_shape(self) -> list[int]:
        """The shape as the protocols print it: -1 for a free axis."""
        return [axis if isinstance(axis, int) else -1 for axis in self.shape]

    def check(self, array: Array, *, lengths: dict[str, int], nan: NanPolicy = "allow") -> None:
        """Raise BadInput unless `array` fits; `lengths` collects the lengths of named axes across tensors."""
        if dtype_name(array.dtype) != self.dtype:
            raise BadInput(
                f"tensor {self.name!r} has datatype {dtype_name(array.dtype)}, expected {self.dtype}",
                hint="convert it before sending: torchship never casts silently",
            )
        if array.ndim != len(self.shape):
            raise BadInput(
                f"tensor {self.name!r} has shape {list(array.shape)}, expected {self.wire_shape}",
                hint="a single row still needs its batch axis" if array.ndim == len(self.shape) - 1 else "",
            )
        for position, (length, axis) in enumerate(zip(array.shape, self.shape, strict=True)):
            self._check_axis(position, length, axis, array, lengths)
        if nan == "refuse" and self.dtype in FLOATS and not np.isfinite(array).all():
            raise BadInput(
                f"tensor {self.name!r} holds NaN or infinity", hint="this model is configured to refuse them"
            )

    def _check_axis(self, position: int, length: int, axis: Axis, array: Array, lengths: dict[str, int]) -> None:
        where = f"tensor {self.name!r} has shape {list(array.shape)}: axis {position} is {length}"
        if isinstance(axis, int):
            if length != axis:
                raise BadInput(f"{where}, expected {axis}", hint=f"the signature is {self}")
            return
        if length < axis.min or (axis.max is not None and length > axis.max):
            span = f"{axis.min} to {axis.max}" if axis.max is not None else f"at least {axis.min}"
            raise BadInput(f"{where}, expected {span}", hint=f"the signature is {self}")
        if axis.name and lengths.setdefault(axis.name, length) != length:
            raise BadInput(
                f"{where}, but axis {axis.name!r} is {lengths[axis.name]} elsewhere",
                hint=f"all axes named {axis.name!r} must be equally long",
            )


class Signature(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a stage takes and gives. `batched`: axis 0 of every tensor holds the rows."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batched: bool = True

    @classmethod
    def parse(cls, text: str, *, batched: bool = True) -> Signature:
        """Read `a:FP32[-1,4], b?:INT8[-1] -> y:FP32[-1]`. Raises BadConfig naming the part that is wrong.

        Optional inputs come last, and the rows of a batched signature are counted by an input that is not optional.
        """
        sides = text.split("->")
        if len(sides) != 2:
            raise BadConfig(f"{text!r} is not a signature", hint='write "inputs -> outputs"')
        inputs, outputs = (tuple(map(TensorSpec.parse, _split(side))) for side in sides)
        found = cls(inputs, outputs, batched)
        if any(spec.optional for spec in outputs):
            raise BadConfig(f"{text!r}: an output is optional", hint="only inputs may be: leave its question mark out")
        if found.required != inputs[: len(found.required)]:
            raise BadConfig(f"{text!r}: an input comes after an optional one", hint="write the optional inputs last")
        if batched and inputs and not found.required:
            raise BadConfig(
                f"{text!r}: every input is optional, but the rows of a batch are counted by one that is there",
                hint="make one input required, or declare the stage without batched=True",
            )
        return found

    def __str__(self) -> str:
        return " -> ".join(", ".join(map(str, side)) for side in (self.inputs, self.outputs))

    @property
    def required(self) -> tuple[TensorSpec, ...]:
        """The inputs that every call brings."""
        return tuple(spec for spec in self.inputs if not spec.optional)

    def taking(self, names: Collection[str]) -> Signature:
        """The same without the optional inputs that are not among `names`."""
        kept = tuple(spec for spec in self.inputs if spec.name in names or not spec.optional)
        return self if kept == self.inputs else msgspec.structs.replace(self, inputs=kept)

    @property
    def fixed(self) -> bool:
        """Whether nothing is free but the number of rows."""
        shapes = [spec.shape[1:] if self.batched else spec.shape for spec in self.inputs]
        return all(isinstance(axis, int) for shape in shapes for axis in shape)

    @property
    def max_rows(self) -> int:
        """How many rows a call may hold: 1 where not batched; the first axis's length or maximum; else 64."""
        first = [spec.shape[0] for spec in self.inputs if spec.shape]
        if not self.batched or not first:
            return 1
        return min(axis if isinstance(axis, int) else axis.max or 64 for axis in first)

    def check(self, tensors: Tensors, *, nan: NanPolicy = "allow") -> int:
        """Raise BadInput naming the fault, or return the number of rows (1 where the signature is not batched)."""
        given: Sequence[TensorSpec] = self.inputs
        if len(tensors) != len(given) or any(spec.name not in tensors for spec in given):
            given = self._given(tensors)
        lengths: dict[str, int] = {}
        for spec in given:
            spec.check(tensors[spec.name], lengths=lengths, nan=nan)
        return _rows(tensors, given) if self.batched else 1

    def _given(self, tensors: Tensors) -> list[TensorSpec]:
        """The inputs that are there, where only optional ones are not. Raises BadInput for any other names."""
        expected = [spec.name for spec in self.inputs]
        missing = [spec.name for spec in self.required if spec.name not in tensors]
        unknown = [name for name in tensors if name not in expected]
        faults = [f"missing {missing}"] * bool(missing) + [f"unknown {unknown}"] * bool(unknown)
        if faults:
            names = ", ".join(f"{spec.name} (optional)" if spec.optional else spec.name for spec in self.inputs)
            raise BadInput(f"input names do not fit: {', '.join(faults)}", hint=f"the inputs are {names}")
        return [spec for spec in self.inputs if spec.name in tensors]


def _rows(tensors: Tensors, given: Sequence[TensorSpec]) -> int:
    """How many rows the tensors have. Raises BadInput where they differ, or there are none."""
    rows = {spec.name: tensors[spec.name].shape[0] for spec in given if spec.shape}
    if len(set(rows.values())) > 1:
        raise BadInput(f"tensors differ in their number of rows: {rows}", hint="axis 0 holds the rows of one batch")
    count = next(iter(rows.values()), 1)
    if count == 0:
        raise BadInput("the batch is empty", hint="send at least one row")
    return count


def _split(text: str) -> Sequence[str]:
    """Split at the commas outside brackets."""
    return [part for part in re.split(r",(?![^\[]*\])", text) if part.strip()]
