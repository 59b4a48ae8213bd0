"""The Guard: compares a candidate's outputs with the eager fp32 reference and refuses what drifts too far.

Default limits by the precision of the recipe (relative L2 error of the worst output, its cosine similarity, share of
rows with the reference's arg-max, among those that the reference decides clearly, where an output looks like a
classifier's, [rows, classes]):

| precision                  | error | cosine | top-1 |
|----------------------------|-------|--------|-------|
| fp32                       | 0.002 | 0.9999 | 0.99  |
| fp16, bf16, tf32           | 0.08  | 0.995  | 0.95  |
| int8 and below, pruned     | 0.30  | 0.955  | 0.90  |

With the user's own metric the metric decides (`max_drop`), and the limits above hold only where they are set.
NaN or infinity where the reference has none always refuses, and so does a wrong shape, dtype or name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from torchship.artifact.manifest import Verdict
from torchship.recipe import Recipe
from torchship.tensors import FLOATS, Array, Signature, Tensors

HOPELESS = 1e9  # the error of an output that cannot be compared; JSON has no infinity
_TIE = 0.2  # in standard deviations of a row's scores
_EXACT, _HALF, _INT8 = (2e-3, 0.9999, 0.99), (0.08, 0.995, 0.95), (0.30, 0.955, 0.90)
_HALF_WORDS = ("fp16", "bf16", "tf32", "half", "f16")
_INT8_WORDS = ("int8", "int4", "fp8", "quant", "prune", "uint8")


class Guard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Limits that a candidate must keep; None means the default for the precision of its recipe.

    `error`: largest relative L2 error of an output. `cosine`: smallest cosine similarity. `top1`: smallest share of
    rows with the reference's arg-max. `max_drop`: largest fall of the user's metric, in its own unit (higher is
    better). `enabled=False` measures but refuses only NaN and wrong shapes.
    """

    error: float | None = None
    cosine: float | None = None
    top1: float | None = None
    max_drop: float = 0.01
    enabled: bool = True

    def limits(self, recipe: Recipe) -> tuple[float, float, float]:
        """Error, cosine and top-1 limits for a recipe."""
        error, cosine, top1 = {"fp32": _EXACT, "half": _HALF, "int8": _INT8}[precision_of(recipe)]
        return (
            error if self.error is None else self.error,
            cosine if self.cosine is None else self.cosine,
            top1 if self.top1 is None else self.top1,
        )


def precision_of(recipe: Recipe) -> str:
    """`fp32`, `half` or `int8`: the coarsest precision that the options of a recipe or its transforms name."""
    words = [recipe.backend, *map(str, recipe.options.values())]
    for step in recipe.transforms:
        words += [step.transform, *map(str, step.options.values())]
    text = " ".join(words).lower()
    if any(word in text for word in _INT8_WORDS):
        return "int8"
    return "half" if any(word in text for word in _HALF_WORDS) else "fp32"


@dataclass
class Agreement:
    """Sums over batches of one output: squared norms, scalar product, arg-max hits."""

    difference: float = 0.0
    reference: float = 0.0
    candidate: float = 0.0
    product: float = 0.0
    hits: int = 0
    rows: int = 0
    clear_hits: int = 0
    clear_rows: int = 0

    def add(self, reference: Array, candidate: Array, *, classifier: bool) -> None:
        """Take one batch in."""
        a, b = reference.astype(np.float64).ravel(), candidate.astype(np.float64).ravel()
        seen = np.isfinite(a)
        a, b = a[seen], b[seen]
        self.difference += float(np.square(a - b).sum())
        self.reference += float(np.square(a).sum())
        self.candidate += float(np.square(b).sum())
        self.product += float(a @ b)
        if classifier:
            same = reference.argmax(-1) == candidate.argmax(-1)
            clear = clearly_decided(reference)
            self.hits += int(same.sum())
            self.rows += len(same)
            self.clear_hits += int((same & clear).sum())
            self.clear_rows += int(clear.sum())

    @property
    def error(self) -> float:
        """Relative L2 error; absolute where the reference is all zero."""
        if self.difference == 0:
            return 0.0
        return math.sqrt(self.difference / self.reference) if self.reference > 0 else math.sqrt(self.difference)

    @property
    def cosine(self) -> float:
        """Cosine similarity; 1 for two zero vectors."""
        scale = math.sqrt(self.reference * self.candidate)
        return self.product / scale if scale > 0 else float(self.difference == 0)


def clearly_decided(scores: Array) -> Array:
    """Which rows of class scores have a best class that leads the second by 0.2 standard deviations of the row.

    The others are ties: whoever swaps two classes there has not got worse.
    """
    wide = scores.astype(np.float64)
    first_two = np.partition(wide, -2, axis=-1)[:, -2:]
    with np.errstate(invalid="ignore"):
        clear: Array = first_two[:, 1] - first_two[:, 0] > _TIE * wide.std(axis=-1)
    return clear


def is_classifier(reference: Array, *, signature: Signature, output: int) -> bool:
    """Whether an output looks like class scores: [rows, 2 or more classes] of floats whose rows are no unit vectors."""
    if (
        not signature.batched
        or reference.ndim != 2
        or reference.shape[1] < 2
        or signature.outputs[output].dtype not in FLOATS
    ):
        return False
    norms = np.linalg.norm(reference.astype(np.float64), axis=1)
    return not np.allclose(norms, 1.0, atol=1e-3) or bool((reference >= 0).all())


def agreement(reference: Iterable[Tensors], candidate: Iterable[Tensors], *, signature: Signature) -> Verdict:
    """The measured agreement of two runs over the same batches, not yet judged.

    `passed` is False, with the reason, for NaN or infinity that the reference does not have and for a wrong name or
    shape.
    """
    sums = [Agreement() for _ in signature.outputs]
    for expected, given in zip(reference, candidate, strict=True):
        for index, spec in enumerate(signature.outputs):
            a, b = expected[spec.name], given.get(spec.name)
            fault = _fault(a, b, spec.name)
            if fault or b is None:
                return Verdict(passed=False, error=HOPELESS, cosine=0.0, reason=fault)
            sums[index].add(a, b, classifier=is_classifier(a, signature=signature, output=index))
    rows, clear = sum(part.rows for part in sums), sum(part.clear_rows for part in sums)
    return Verdict(
        passed=True,
        error=min(max((part.error for part in sums), default=0.0), HOPELESS),
        cosine=min((part.cosine for part in sums), default=1.0),
        top1=sum(part.hits for part in sums) / rows if rows else None,
        clear_top1=sum(part.clear_hits for part in sums) / clear if clear else None,
        clear_rows=clear,
    )


def _fault(expected: Array, given: Array | None, name: str) -> str:
    if given is None:
        return f"output {name!r} is missing"
    if expected.shape != given.shape:
        return f"output {name!r} has shape {list(given.shape)}, the reference {list(expected.shape)}"
    if expected.dtype != given.dtype:
        return f"output {name!r} is {given.dtype}, the reference {expected.dtype}"
    bad = ~_finite(given) & _finite(expected)
    if bad.any():
        count = f"{int(bad.sum())} of {bad.size} places"
        return f"output {name!r} holds NaN or infinity in {count} where the reference has none"
    return ""


def _finite(array: Array) -> Array:
    return np.isfinite(array) if array.dtype.kind not in "biu" else np.ones(array.shape, bool)


def judge(found: Verdict, *, guard: Guard, recipe: Recipe) -> Verdict:
    """The verdict on a measured agreement; one odd row is always forgiven for top-1.

    Pure: the same numbers and limits give the same verdict.
    """
    if not found.passed or not guard.enabled:
        return found
    reasons = _metric_reasons(found, guard) if found.metric is not None else []
    error, cosine, top1 = guard.limits(recipe)
    by_metric = found.metric is not None
    if found.error > error and not (by_metric and guard.error is None):
        reasons.append(f"output error {found.error:.3g} is above {error:g}")
    if found.cosine < cosine and not (by_metric and guard.cosine is None):
        reasons.append(f"cosine {found.cosine:.4f} is below {cosine:g}")
    if found.clear_top1 is not None and not (by_metric and guard.top1 is None):
        missed = round((1 - found.clear_top1) * found.clear_rows)
        if missed > max(1, (1 - top1) * found.clear_rows):
            where = f"on the {found.clear_rows} rows that the reference decides clearly"
            reasons.append(f"top-1 agreement {found.clear_top1:.3f} {where} is below {top1:g}")
    return msgspec.structs.replace(found, passed=not reasons, reason="; ".join(reasons))


def _metric_reasons(found: Verdict, guard: Guard) -> list[str]:
    assert found.metric is not None and found.reference_metric is not None  # noqa: S101, PT018  # set together
    drop = found.reference_metric - found.metric
    if drop > guard.max_drop + 1e-12:
        return [
            f"the metric fell by {drop:.4g} ({found.reference_metric:.4g} to {found.metric:.4g}), "
            f"more than {guard.max_drop:g}"
        ]
    return []


def rows_judged(reference: Sequence[Tensors], *, signature: Signature) -> int:
    """How many rows the top-1 agreement was taken over."""
    if not signature.batched or not signature.outputs:
        return len(reference)
    name = signature.outputs[0].name
    return sum(batch[name].shape[0] for batch in reference)
