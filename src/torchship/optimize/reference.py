"""The reference: what the eager fp32 module answers, computed once and kept as safetensors for every trial."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from torchship.artifact import tensorfile
from torchship.errors import BadInput, CaptureFailed
from torchship.lowering.program import as_error
from torchship.model import Model, to_numpy
from torchship.optimize import cache as caching
from torchship.optimize import decisions, laws
from torchship.optimize.axes import UNSTEADY
from torchship.optimize.judge import FEWEST_GROUPS, PLAN, JudgedBatch, JudgedSet
from torchship.optimize.laws import Law, Probe
from torchship.optimize.measure import resized
from torchship.optimize.samples import flatten_samples, random_inputs, rows_of, vocabulary_of
from torchship.optimize.yardstick import study
from torchship.stage import Parameter, Parameters
from torchship.tensors import Signature, Tensors, TensorSpec

GROUP = "group"
JUDGED_ROWS = 1024
_FEWEST = 256
_SECONDS = 10.0
_FIRST = 32  # rows to begin with where all of them would take long
_LONG = 15.0  # seconds of the reference
FIT_ROWS = 512
_PIECE = 32
_NOISE_CALLS = 2
_KEPT_BYTES = 512 * 2**20


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
    drawn = decisions.drawn(module.run, model.torch_inputs(model.examples[0]))
    found = [f"random numbers at {place}: {place.code}" for place in drawn[:3]] or [
        f"self.{path} is changed by each call" for path in module.remembers[:3]
    ]
    where = f" ({'; '.join(found)})" if found else ""
    raise CaptureFailed(
        f"{model.name}: {UNSTEADY}{where}. No guard can compare answers with that",
        hint="pass noise and state in as inputs, and return the new state; torchship doctor names the part",
    )


def split(model: Model, samples: Iterable[Any]) -> tuple[Model, list[Tensors], list[int] | None]:
    """The model with the user's data for quantizers as flat batches; batches for the guard, the group of each row.

    The guard has the second half, where there are four batches or more; the quantizers at most 512 rows. Rows of one
    group (crops of one picture) all go to one side: half of the groups, or fewer where the guard would have too few to
    prove anything.
    """
    samples, signature = list(samples), model.signature
    groups = grouped(samples, signature=signature)
    batches = flatten_samples(samples, signature=signature, rows=JUDGED_ROWS + FIT_ROWS)
    if groups is None and len(batches) < 4:
        return replace(model, calibration=batches), batches, None
    if groups is None:
        half = len(batches) // 2
        before = accumulate((rows_of(batch, signature=signature) for batch in batches[:half]), initial=0)
        fit = [batch for batch, rows in zip(batches[:half], before, strict=False) if rows < FIT_ROWS]
        return replace(model, calibration=fit), batches[half:], None
    joined = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    groups = groups[: rows_of(joined, signature=signature)]
    order = list(dict.fromkeys(groups))
    few = max(len(order) // 5, min(len(order) // 2, len(order) - FEWEST_GROUPS))  # enough are left to prove something
    ours = set(order[: max(1, few)]) if len(order) > 1 else set()
    inside = np.array([group in ours for group in groups])
    fit = _pieces({name: array[inside] for name, array in joined.items()}, size=_PIECE)
    held = _pieces({name: array[~inside] for name, array in joined.items()}, size=_PIECE)
    fit = (fit or held)[: FIT_ROWS // _PIECE]
    return replace(model, calibration=fit), held, [group for group in groups if group not in ours]


class Reference:
    """What candidates are judged on: inputs, the reference's outputs and the plan, as files in `folder`.

    Real rows are the held-back ones, or else the user's examples. They end after some seconds of the reference's time
    (where 256 rows are done), 1,024 rows or half a gigabyte: every candidate has to answer them all. Where `stepwise`,
    and 256 rows would take long, there are few until `grow` is called, so that something is judged by then. `hash` is
    that of all there is. Raises BadInput for data that the module refuses.
    """

    def __init__(
        self,
        folder: Path,
        model: Model,
        *,
        held_back: Sequence[Tensors],
        groups: Sequence[int] | None = None,
        stepwise: bool = False,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.whole, self.rows = folder, False, 0
        self._stage, self._groups = EagerStage(model), groups
        self._entries, self._hashes, self._outputs = list[JudgedBatch](), list[str](), list[Tensors]()
        self._seconds, self._bytes = 0.0, 0
        signature = model.signature
        tried = int(getattr(model.module, "tried", 0))
        own = list(model.examples[: len(model.examples) - tried])
        made = [*model.examples[len(own) :], *model.edges]
        real = own
        if held_back:
            size = min(_PIECE, signature.max_rows)
            real = [p for batch in held_back for p in (_pieces(batch, size=size) if signature.batched else [batch])]
            made = [*own, *made]
        self._waiting = deque(real)
        self._answer(stepwise=stepwise)
        _refuse_nan(self._outputs, model)
        if signature.batched and signature.max_rows > 1:
            made += [resized(real[0], rows=rows) for rows in (1, min(5, signature.max_rows))]
        for batch in (*made, *([] if held_back else _random(model))):
            numbers_alone = laws.masks_all(batch, batched=signature.batched)
            self._keep(JudgedBatch("finite" if numbers_alone else "made"), batch, self._stage(batch))
        base = real[0]
        if signature.batched:  # four rows of real data, the same ones again where there are fewer
            base = resized(base, rows=min(laws.BASE_ROWS, signature.max_rows))
        found = laws.probes(base, signature=signature, answer=self._stage)
        for probe in (Probe(Law(""), base, self._stage(base)), *found):
            self._keep(JudgedBatch("law", probe.law), probe.inputs, probe.outputs)
        self.plan, self.hash = self._planned()

    @property
    def row_s(self) -> float:
        """Seconds that the module takes for one of many rows."""
        return self._seconds / max(1, self.rows)

    @property
    def left_s(self) -> float:
        """About how long `grow` takes, in seconds."""
        left = sum(rows_of(batch, signature=self._stage.signature) for batch in self._waiting)
        return self.row_s * min(left, max(0, _FEWEST - self.rows))

    def grow(self) -> None:
        """Have the reference answer all the rows. What was judged before was judged on fewer."""
        self._answer()
        self.plan, self.hash = self._planned()

    def _answer(self, *, stepwise: bool = False) -> None:
        signature = self._stage.signature
        while self._waiting:
            if stepwise and self.rows >= _FIRST and self.left_s > _LONG:
                return
            enough = self.rows >= _FEWEST and self._seconds > _SECONDS
            if enough or self.rows >= JUDGED_ROWS or self._bytes > _KEPT_BYTES:
                break
            batch, started = self._waiting[0], time.monotonic()
            shapes = ", ".join(f"{name}{list(array.shape)}" for name, array in batch.items())
            hint = "call the module with that data in plain Python first"
            with as_error(BadInput, f"the model itself fails on data to judge by ({shapes})", hint=hint):
                answer = self._stage(batch)
            self._seconds += time.monotonic() - started
            self._bytes += sum(array.nbytes for array in (*batch.values(), *answer.values()))
            self.rows += rows_of(self._waiting.popleft(), signature=signature)
            self._outputs.append(answer)
            self._keep(JudgedBatch("real"), batch, answer)
        self.whole = True
        self._waiting.clear()

    def _keep(self, entry: JudgedBatch, batch: Tensors, answer: Tensors) -> None:
        index = len(self._entries)
        (self.folder / f"{index}.in.safetensors").write_bytes(tensorfile.encode(batch))
        (self.folder / f"{index}.out.safetensors").write_bytes(tensorfile.encode(answer))
        self._entries.append(entry)
        self._hashes.append(caching.hash_tensors([batch]))

    def _planned(self) -> tuple[JudgedSet, str]:
        """The plan, which is written for the children, and a hash of it and of all inputs."""
        known = None if self._groups is None else tuple(self._groups[: self.rows])
        yards = tuple(study(self._outputs, signature=self._stage.signature))
        plan = JudgedSet(tuple(self._entries), yards, known, rows=self.rows)
        (self.folder / PLAN).write_bytes(msgspec.json.encode(plan))
        if self.whole:
            self._outputs.clear()
        return plan, caching.digest(self._hashes, plan)


def _refuse_nan(outputs: Sequence[Tensors], model: Model) -> None:
    for spec in model.signature.outputs:
        arrays = [answer[spec.name] for answer in outputs if answer[spec.name].dtype.kind not in "biuO"]
        if any(array.size for array in arrays) and not any(np.isfinite(a.astype(np.float64)).any() for a in arrays):
            raise BadInput(
                f"output {spec.name!r} of the model itself is NaN or infinite everywhere: nothing can be compared",
                hint="give inputs (examples, --data) that the model answers with numbers",
            )


def _pieces(batch: Tensors, *, size: int) -> list[Tensors]:
    """A batch in pieces of at most `size` rows."""
    count = next(iter(batch.values())).shape[0]
    return [{name: array[i : i + size] for name, array in batch.items()} for i in range(0, count, size)]


def _random(model: Model) -> list[Tensors]:
    """Noise shaped like the first example: other values than the user's few. Eight rows, or two calls of a model
    without rows, which keep the example's integers: there they may be offsets or indices.

    Masks are those of the example, for a row that is masked throughout is no row. None where the module refuses noise.
    """
    signature, first = model.signature, model.examples[0]
    rows, batched = min(8, signature.max_rows), signature.batched
    lengths = {
        s.name: (s.shape[0], *first[s.name].shape[1:]) if batched else first[s.name].shape for s in signature.inputs
    }
    shaped = [TensorSpec(s.name, s.dtype, lengths[s.name]) for s in signature.inputs]
    kept = {name: a for name, a in first.items() if laws.is_mask(name, a) or not (batched or a.dtype.kind == "f")}
    found = list[Tensors]()
    for seed in range(1, 2 if batched else 1 + _NOISE_CALLS):
        tensors = random_inputs(shaped, rows=rows, vocabulary=vocabulary_of(model.module), seed=seed)
        made = {s.name: to_numpy(t) for s, t in zip(shaped, tensors, strict=True)}
        made |= resized(kept, rows=rows) if batched else kept
        try:
            EagerStage(model)(made)
        except Exception:  # values that it was not made for
            return found
        found.append(made)
    return found if batched or len(kept) < len(first) else []


def grouped(samples: Sequence[Any], *, signature: Signature) -> list[int] | None:
    """The group of each row, where the data says so: samples that are dicts with a key "group" beside the inputs, one
    value for each row or one for all. Crops of one picture, or sentences of one document, are one group: they prove no
    more than a single row does. None where no sample says it. Raises BadInput where only some do, or their number
    differs from that of the rows.
    """
    names = [spec.name for spec in signature.inputs]
    if not signature.batched or GROUP in names:
        return None
    said = [isinstance(sample, Mapping) and GROUP in sample for sample in samples]
    if not any(said):
        return None
    found, known = list[int](), dict[Any, int]()
    for index, sample in enumerate(samples):
        batch = flatten_samples([sample], signature=signature, rows=sys.maxsize)[0]
        rows = rows_of(batch, signature=signature)
        values = np.ravel(np.asarray(sample[GROUP])).tolist() if said[index] else []
        if len(values) not in (1, rows):
            raise BadInput(
                f"calibration sample {index} names {len(values)} groups for {rows} rows",
                hint='give every sample a "group": one value for each row, or one for all of them',
            )
        found += [known.setdefault(value, len(known)) for value in (values * rows if len(values) == 1 else values)]
    return found
