"""Trains a pruned module on the user's rows: which rows those are, and the default loop, a distillation.

The student learns the original's answers (Hinton et al., arXiv:1503.02531) and, where the data has labels and the model
gives class scores, those too. Rows that the guard judges on are never among what it is trained on.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import msgspec
import numpy as np
import torch

from torchship.errors import OptimizeError
from torchship.model import Model, to_torch
from torchship.optimize import reference
from torchship.optimize.config import Distill
from torchship.optimize.flatten import outline
from torchship.optimize.samples import flatten_samples, labels_of, rows_of
from torchship.tensors import Array, Tensors

Rows: TypeAlias = list[tuple[Tensors, Array | None]]  # batches as the signature has them, with labels where there are
_MOST_ROWS = 1 << 16
_MOST_BYTES = 4 * 2**30
_BATCH = 64
_HELD = 8  # one batch in so many is not trained on, but says when to stop
_PATIENCE = 3
_RATE = 1e-3
_TEMPERATURE = 2.0


class Trained(msgspec.Struct, frozen=True):
    """What a training took: epochs, rows, and the loss of the weights that were kept, on the rows held back."""

    epochs: int
    rows: int
    loss: float


def training_rows(
    samples: Sequence[Any], *, model: Model, held_back: Sequence[Tensors], groups: Sequence[int] | None
) -> Rows:
    """All rows of `samples` but those that the guard has, by their content, and those of its groups.

    65,536 rows or 4 GiB at most.
    """
    signature, taken = model.signature, {key for batch in held_back for key in _keys(batch, model)}
    numbers = reference.grouped(samples, signature=signature)
    apart, place, found, left, size = set(groups or ()), 0, Rows(), _MOST_ROWS, 0
    for sample in samples:
        batch = flatten_samples([sample], signature=signature, rows=1 << 62)[0]
        rows = rows_of(batch, signature=signature)
        own = numbers[place : place + rows] if numbers is not None else [-1] * rows
        place += rows
        free = np.array([k not in taken and n not in apart for k, n in zip(_keys(batch, model), own, strict=True)])
        free &= np.cumsum(free) <= left
        if not free.any():
            continue
        labels = labels_of(sample, signature=signature, rows=rows)
        kept = {name: array[free] for name, array in batch.items()} if signature.batched else batch
        found.append((kept, None if labels is None else labels[free]))
        left -= int(free.sum())
        size += sum(array.nbytes for array in kept.values())
        if left <= 0 or size > _MOST_BYTES:
            break
    return found


def _keys(batch: Tensors, model: Model) -> Iterator[bytes]:
    """The content of each row; of a whole batch where there are no rows."""
    if not model.signature.batched:
        yield hashlib.blake2b(b"".join(array.tobytes() for array in batch.values())).digest()
        return
    for row in range(rows_of(batch, signature=model.signature)):
        yield hashlib.blake2b(b"".join(array[row].tobytes() for array in batch.values())).digest()


def count(rows: Rows, model: Model) -> int:
    """How many rows there are."""
    return sum(rows_of(batch, signature=model.signature) for batch, _ in rows)


def in_batches(rows: Rows, model: Model) -> Rows:
    """The rows in batches of 64, mixed where they can be joined; as they came where they cannot."""
    shapes = {tuple((name, a.shape[1:], a.dtype) for name, a in batch.items()) for batch, _ in rows}
    labelled = {labels is not None for _, labels in rows}
    if not model.signature.batched or len(shapes) > 1 or len(labelled) > 1:
        return rows
    joined = {name: np.concatenate([batch[name] for batch, _ in rows]) for name in rows[0][0]}
    labels = np.concatenate([known for _, known in rows if known is not None]) if labelled == {True} else None
    total = len(next(iter(joined.values())))
    order, size = np.random.default_rng(0).permutation(total), min(_BATCH, model.signature.max_rows)
    places = [order[start : start + size] for start in range(0, total, size)]
    places = places if len(places) < 2 or len(places[-1]) > 1 else places[:-1]  # batch norms cannot learn from one row
    return [({name: a[at] for name, a in joined.items()}, None if labels is None else labels[at]) for at in places]


def scores(model: Model) -> int | None:
    """The place of the only output that is class scores by its shape, [rows, classes]; None where there is none."""
    specs = model.signature.outputs
    found = [place for place, spec in enumerate(specs) if spec.dtype.startswith(("FP", "BF")) and len(spec.shape) == 2]
    return found[0] if len(found) == 1 and model.signature.batched else None


def importance_loss(rows: Rows, model: Model) -> Callable[[Any], torch.Tensor]:
    """The loss whose slope tells what each channel is worth: of the labels, else of the original's own first choice;
    of the size of the answers where they are no scores."""
    batches, place = in_batches(rows, model)[:4], scores(model)
    teacher: Any = model.module

    def loss(student: Any) -> torch.Tensor:
        parts = []
        for batch, labels in batches:
            given = model.torch_inputs(batch)
            answers = student(*given)
            if place is None:
                parts += [answer.square().mean() for answer in answers if answer.is_floating_point()]
                continue
            with torch.no_grad():
                wanted = teacher(*given)[place].argmax(-1) if labels is None else to_torch(labels)
            parts.append(torch.nn.functional.cross_entropy(answers[place], wanted))
        return torch.stack(parts).mean()

    return loss


def distil(
    student: Any, model: Model, rows: Rows, *, epochs: int, by_labels: float, on_epoch: Callable[[int, float], None]
) -> Trained:
    """Train `student` (flat, as `model.module`, the teacher) in place; it has the weights of its best epoch then.

    `by_labels` is the weight of the labels in the loss, beside the original's answers.
    Adam with decoupled decay and one cosine of the rate. Ends where three epochs in a row brought the loss on the rows
    that are held back (one batch in eight) no lower. Raises OptimizeError where the loss is no number.
    """
    batches, place = in_batches(rows, model), scores(model)
    held = batches[:: max(2, min(_HELD, len(batches)))] if len(batches) > 1 else batches
    learnt = [batch for batch in batches if not any(batch is other for other in held)] or batches
    optimizer = torch.optim.AdamW(student.parameters(), lr=_RATE)
    cycle = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * len(learnt))
    random, best, kept, idle = np.random.default_rng(1), float("inf"), copy.deepcopy(student.state_dict()), 0
    epoch = 0
    while epoch < epochs and idle < _PATIENCE:
        student.train()
        for number in random.permutation(len(learnt)):
            optimizer.zero_grad()
            _loss(student, model, *learnt[number], place=place, by_labels=by_labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            cycle.step()
        epoch += 1
        student.eval()
        with torch.no_grad():
            now = float(
                torch.stack([_loss(student, model, *batch, place=place, by_labels=by_labels) for batch in held]).mean()
            )
        if not np.isfinite(now):
            raise OptimizeError("the training of the pruned module ends in NaN", hint="give your own: --train")
        idle = 0 if now < best else idle + 1
        if now < best:
            best, kept = now, copy.deepcopy(student.state_dict())
        on_epoch(epoch, now)
    student.load_state_dict(kept)
    return Trained(epoch, count(learnt, model), best)


def _loss(
    student: Any, model: Model, batch: Tensors, labels: Array | None, *, place: int | None, by_labels: float
) -> torch.Tensor:
    given = model.torch_inputs(batch)
    teacher: Any = model.module
    with torch.no_grad():
        wanted = teacher(*given)
    answers = student(*given)
    apart = [distance(w, f) for w, f in zip(wanted, answers, strict=True) if w.is_floating_point()]
    loss = torch.stack(apart).mean()
    if labels is None or place is None:
        return loss
    truth = torch.nn.functional.cross_entropy(answers[place], to_torch(labels))
    return (1 - by_labels) * loss + by_labels * truth


def distillation(teacher: Any) -> Distill:
    """The loss of a student's outputs against the answers of `teacher` to the same arguments."""

    def distill(outputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        with torch.no_grad():
            wanted = outline(teacher(*args, **kwargs))
        pairs = ((w.value, f.value) for w, f in zip(wanted, outline(outputs), strict=True))
        parts = [distance(w, f) for w, f in pairs if w.is_floating_point()]
        return torch.stack(parts).mean()

    return distill


def distance(wanted: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Scores [rows, classes] by softened Kullback-Leibler divergence, all else by relative squared error."""
    if wanted.dim() == 2 and wanted.shape[1] > 1:
        soft = torch.nn.functional.softmax(wanted / _TEMPERATURE, -1)
        log = torch.nn.functional.log_softmax(found / _TEMPERATURE, -1)
        return torch.nn.functional.kl_div(log, soft, reduction="batchmean") * _TEMPERATURE**2
    return (wanted - found).square().mean() / (wanted.square().mean() + 1e-12)
