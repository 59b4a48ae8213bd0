"""The reference: what the eager fp32 module answers, computed once and kept as safetensors for every trial."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchship.artifact import tensorfile
from torchship.errors import BadInput, CaptureFailed
from torchship.model import Model, to_numpy
from torchship.optimize.axes import UNSTEADY
from torchship.optimize.samples import random_inputs, resize, rows_of, vocabulary_of
from torchship.stage import Parameter, Parameters
from torchship.tensors import Tensors

JUDGED_ROWS = 256
_HELD_BACK = 0.25
_KEPT_BYTES = 512 * 2**20
_FAINT = 1e-6


class EagerStage:
    """A Model's own module as a Stage in this process."""

    def __init__(self, model: Model) -> None:
        self.signature = model.signature
        self.max_batch = model.signature.max_rows
        self.parameters: tuple[Parameter, ...] = ()
        self._model = model

    def __call__(self, tensors: Tensors, parameters: Parameters = {}) -> Tensors:
        """Run the module without gradients."""
        with torch.inference_mode():
            outputs = self._model.module(*self._model.torch_inputs(tensors))
        specs = self.signature.outputs
        return {spec.name: np.asarray(to_numpy(out)) for spec, out in zip(specs, outputs, strict=True)}

    def close(self) -> None:
        """Nothing to give back."""


def refuse_unsteady(model: Model) -> None:
    """Raise CaptureFailed where the module answers the same input differently: there is nothing to compare with."""
    module: Any = model.module
    if module.steady:
        return
    raise CaptureFailed(
        f"{model.name}: {UNSTEADY}. No guard can compare answers with that",
        hint="torchship doctor names the part; pass noise and state in as inputs, or give your own metric",
    )


def split_calibration(samples: Sequence[Tensors]) -> tuple[list[Tensors], list[Tensors]]:
    """Batches for the quantizers and batches for the guard: the last quarter is held back where there are enough."""
    batches = list(samples)
    if len(batches) < 4:
        return batches, batches
    cut = len(batches) - max(1, int(len(batches) * _HELD_BACK))
    return batches[:cut], batches[cut:]


def judged_batches(model: Model, *, held_back: Sequence[Tensors], rows: int = JUDGED_ROWS) -> list[Tensors]:
    """What the guard compares on: every example, one row by itself, and real data (random rows where there is none)."""
    signature = model.signature
    found = [*model.examples, *model.edges]
    if not signature.batched:
        return found + list(held_back)[:rows]
    first = found[0]
    if signature.max_rows > 1:
        found = [resize(first, rows=1), *found, resize(first, rows=min(5, signature.max_rows))]
    if held_back:
        count = 0
        for batch in held_back:
            found += _pieces(batch, size=min(32, signature.max_rows))
            count += rows_of(batch, signature=signature)
            if count >= rows:
                break
    else:
        found += _random(model)
    return found


def _pieces(batch: Tensors, *, size: int) -> list[Tensors]:
    count = next(iter(batch.values())).shape[0]
    return [{name: array[i : i + size] for name, array in batch.items()} for i in range(0, count, size)]


def _random(model: Model) -> list[Tensors]:
    """Eight noise rows shaped like the first example: a weak stand-in for real data.

    Masks are those of the example, for a row that is masked throughout is no row. None where the module refuses noise.
    """
    signature = model.signature
    first = model.examples[0]
    shaped = [
        type(spec)(spec.name, spec.dtype, (spec.shape[0], *first[spec.name].shape[1:])) for spec in signature.inputs
    ]
    count = min(8, signature.max_rows)
    tensors = random_inputs(shaped, rows=count, vocabulary=vocabulary_of(model.module), seed=1)
    made = {s.name: np.asarray(to_numpy(t)) for s, t in zip(shaped, tensors, strict=True)}
    masks = [s.name for s in shaped if s.dtype == "BOOL" or "mask" in s.name.lower()]
    made |= resize({name: first[name] for name in masks}, rows=count)
    try:
        EagerStage(model)(made)
    except Exception:  # values that it was not made for
        return []
    return [made]


def doubts(outputs: Sequence[Tensors]) -> tuple[str, ...]:
    """What is odd about the reference's own answers, in words for the report."""
    peaks = [np.abs(a).max() for answers in outputs for a in answers.values() if a.dtype.kind == "f" and a.size]
    if not peaks or max(peaks) > _FAINT:
        return ()
    return (
        f"all answers of the model itself are below {_FAINT:g}: its weights look untrained, int8 may not hold them",
    )


def write(folder: Path, *, stage: EagerStage, batches: Sequence[Tensors]) -> list[Tensors]:
    """Run the reference on `batches`, keep inputs and outputs as numbered files in `folder`, return the outputs.

    Ends when half a gigabyte is kept: the outputs of a segmentation net are large. Raises BadInput for data that the
    module refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    outputs: list[Tensors] = []
    kept = 0
    for index, batch in enumerate(batches):
        if kept > _KEPT_BYTES:
            break
        try:
            answer = stage(batch)
        except Exception as fault:
            shapes = ", ".join(f"{name}{list(array.shape)}" for name, array in batch.items())
            raise BadInput(
                f"the model itself fails on data to judge by ({shapes}): {type(fault).__name__}: {fault}",
                hint="call the module with that data in plain Python first",
            ) from fault
        outputs.append(answer)
        kept += sum(array.nbytes for array in (*batch.values(), *answer.values()))
        (folder / f"{index}.in.safetensors").write_bytes(tensorfile.encode(batch))
        (folder / f"{index}.out.safetensors").write_bytes(tensorfile.encode(answer))
    return outputs
