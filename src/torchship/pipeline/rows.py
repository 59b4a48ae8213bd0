"""Runs one stage for one job: row stages in chunks of `max_batch`, and not at all without rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from torchship.errors import BadInput, StageFailed
from torchship.stage import Parameters, Stage
from torchship.tensors import Signature, Tensors, dtype_name, numpy_dtype, plain


def run(
    stage: Stage,
    tensors: Tensors,
    parameters: Parameters = {},
    *,
    max_batch: int = 0,
    declared: Signature | None = None,
) -> Tensors:
    """The outputs of `stage` for one job of any number of rows. `max_batch=0` takes the stage's own.

    `declared` is what the outputs of each call are checked against, where several are joined.

    Raises StageFailed when a row stage does not give one row for each that it took.
    """
    signature = stage.signature
    if not signature.batched:
        return stage(tensors, parameters)
    counts = {name: array.shape[0] for name, array in tensors.items()}
    rows = next(iter(counts.values()), 1)
    if any(count != rows for count in counts.values()):
        raise BadInput(f"tensors differ in their number of rows: {counts}", hint="axis 0 holds the rows of one batch")
    if rows == 0:
        return empty(signature)
    most = max_batch or stage.max_batch
    if rows <= most:
        return check_rows(stage(tensors, parameters), rows)
    parts = [
        check_rows(stage({n: a[at : at + most] for n, a in tensors.items()}, parameters), min(most, rows - at))
        for at in range(0, rows, most)
    ]
    if declared is not None:  # before they are joined: what is joined may hide what one call gave
        parts = [check_outputs(declared, part) for part in parts]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def check_rows(outputs: Tensors, rows: int) -> Tensors:
    """`outputs` when each has `rows` rows: rows are told apart by their place, so a wrong count must never go on."""
    for name, array in outputs.items():
        if not array.ndim or array.shape[0] != rows:
            raise StageFailed(
                f"output {name!r} has shape {list(array.shape)} for {rows} rows",
                hint="a row stage gives one row for each that it takes; declare it without batched=True otherwise",
            )
    return outputs


def empty(signature: Signature) -> dict[str, np.ndarray[Any, Any]]:
    """What a row stage gives for no rows: outputs of length 0, free axes at their least."""
    return {
        spec.name: np.empty(
            (0, *(axis if isinstance(axis, int) else axis.min for axis in spec.shape[1:])), numpy_dtype(spec.dtype)
        )
        for spec in signature.outputs
    }


def check_outputs(signature: Signature, outputs: Tensors) -> Tensors:
    """The declared outputs as the wire and shared memory take them (see `tensors.plain`).

    Raises StageFailed where names, datatypes, ranks or fixed axes are not those that the stage declares, or an element
    of BYTES is neither bytes nor text.
    """
    checked = {}
    for spec in signature.outputs:
        array = outputs.get(spec.name)
        if array is None:
            raise StageFailed(f"gave no {spec.name!r}, which it declares", hint=f"it gave {sorted(outputs)}")
        try:
            found, given = dtype_name(array.dtype), plain(array)
        except BadInput as fault:
            raise StageFailed(f"gave {spec.name!r}: {fault}", hint=fault.hint) from None
        fits = array.ndim == len(spec.shape) and all(
            length == axis for length, axis in zip(array.shape, spec.shape, strict=False) if isinstance(axis, int)
        )
        if found != spec.dtype or not fits:
            text = f"gave {spec.name!r} as {found}{list(array.shape)}, it declares {spec}"
            raise StageFailed(text, hint="mend the stage's signature")
        checked[spec.name] = given
    return checked
