"""Admission: requests are checked, once, in the fast way for what is right and the explaining way for the rest, and
only so many are let onto a line at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from torchship.errors import BadInput, Busy
from torchship.serve.engine.ipc.arena import size_of
from torchship.serve.engine.queue import Job
from torchship.stage import Parameter, Value
from torchship.tensors import Free, NanPolicy, Signature, Tensors, numpy_dtype
from torchship.wire.messages import RawInputs

_ENDS = {"sequence_start", "sequence_end"}


class RequestValidator:
    """Checks the tensors and parameters of requests against a signature."""

    def __init__(
        self, signature: Signature, *, parameters: tuple[Parameter, ...] = (), nan: NanPolicy = "allow"
    ) -> None:
        self.signature = signature
        self.order: tuple[str, ...] = ()  # of the names in which bytes that came in can be used as they are
        self._nan: NanPolicy = nan
        self._optional = len(signature.required) < len(signature.inputs)
        self._parameters = {parameter.name: parameter for parameter in parameters}
        self._plain: list[tuple[str, np.dtype[Any], tuple[int, ...]]] = []
        self._simple = nan == "allow" and self._learn()
        self._row_size = sum([int(np.prod(shape, dtype=np.int64)) * dtype.itemsize for _, dtype, shape in self._plain])

    def _learn(self) -> bool:
        """Whether dtype and trailing axes say everything, as they do for fixed shapes with a plain batch axis."""
        for spec in self.signature.inputs:
            axes = spec.shape[1:] if self.signature.batched else spec.shape
            fixed = tuple(axis for axis in axes if isinstance(axis, int))
            if len(fixed) != len(axes) or spec.dtype == "BYTES":
                return False
            if self.signature.batched and (not spec.shape or spec.shape[0] != Free()):
                return False
            self._plain.append((spec.name, numpy_dtype(spec.dtype), fixed))
        return True

    def admit(self, job: Job) -> None:
        """Check a job's tensors and measure it: its rows (1 where the signature is not batched) and its bytes.

        An optional input that is not there becomes None in `job.tensors`. Raises BadInput naming the fault.
        """
        tensors = job.tensors
        layout = tensors.layout if type(tensors) is RawInputs else None
        if layout is not None and layout.passed is self:
            job.rows, job.size = layout.rows, layout.size
            return
        if self._simple and len(tensors) == len(self._plain):
            rows = self._quick(tensors)
            if rows:
                job.rows = rows
                job.size = rows * self._row_size
                if layout is not None:
                    layout.passed, layout.rows, layout.size = self, job.rows, job.size
                    layout.usable = layout.names == self.order
                return
        for name, array in tensors.items():
            if array.dtype.hasobject and (odd := [item for item in array.flat if not isinstance(item, bytes)]):
                raise BadInput(f"tensor {name!r} holds {type(odd[0]).__name__}, expected bytes")
        job.rows = self.signature.check(tensors, nan=self._nan)
        job.size = sum([size_of(array) for array in tensors.values()])
        if self._optional:
            absent: dict[str, Any] = dict.fromkeys([spec.name for spec in self.signature.inputs])
            job.tensors = {**absent, **tensors}

    def _quick(self, tensors: Tensors) -> int:
        """The number of rows; 0 for anything that needs a second look."""
        rows = 0
        batched = self.signature.batched
        for name, dtype, shape in self._plain:
            array = tensors.get(name)
            if array is None or (array.dtype is not dtype and array.dtype != dtype):
                return 0
            found = array.shape
            if not batched:
                if found != shape:
                    return 0
                rows = 1
            elif not found or found[1:] != shape or (rows and found[0] != rows):
                return 0
            else:
                rows = found[0]
        return rows

    def values(self, given: Mapping[str, Value]) -> dict[str, Value]:
        """The parameters that the stages know, checked. Raises BadInput for one out of its bounds."""
        known = self._parameters
        name = given.get("sequence_id")
        if isinstance(name, int) and "sequence_id" in known and isinstance(known["sequence_id"].default, str):
            given = {**given, "sequence_id": str(name)}  # clients may count sequences or name them
        found = {name: known[name].check(value) for name, value in given.items() if name in known}
        if "sequence_id" in known:  # where a sequence starts and ends matters to the line, whatever the stage names
            found |= {name: Parameter(name, False).check(given[name]) for name in _ENDS & given.keys() - known.keys()}
        for name, value in found.items():
            if type(value) is int and not -(2**63) <= value < 2**63:
                raise BadInput(f"parameter {name!r} is {value:.3g}", hint="a whole number has at most 64 bits")
        return found


@dataclass(slots=True, kw_only=True)
class AdmissionLimit:
    """Counts the rows and bytes that are on a line, and turns away what would be too much."""

    max_rows: int
    max_bytes: int
    jobs: int = 0
    rows: int = 0
    size: int = 0

    def enter(self, job: Job) -> None:
        """Count a job in. Raises Busy when it does not fit; an empty line takes any job."""
        rows, size = self.rows + job.rows, self.size + job.size
        if self.jobs and (rows > self.max_rows or size > self.max_bytes):
            raise Busy(
                f"the line is full: {self.rows} rows and {self.size / 2**20:.1f} MiB are on it",
                hint=f"it holds {self.max_rows} rows and {self.max_bytes / 2**20:.0f} MiB; try again later",
            )
        self.jobs += 1
        self.rows = rows
        self.size = size

    def leave(self, jobs: int, rows: int, size: int) -> None:
        """Count jobs out, with their rows and bytes."""
        self.jobs -= jobs
        self.rows -= rows
        self.size -= size
