"""Measures what a candidate costs beside the reference, and how sure that is: an estimate and a 95 % bound from above.

Class scores: the expected loss of accuracy under the reference's own probabilities, the mean over rows of p(its best
class) - p(the candidate's best class). A flip between near ties costs little, one on a sure row much. Those
probabilities are not the truth, and no label tells by how much they are wrong: the bound therefore counts a flip at no
less than 0.2. What it covers with 95 % certainty is the choice of the rows.
Embeddings: how much less similar, by the reference, the candidate's nearest neighbour of a row is than the true one.
Labels, and other integers: the share that is different. Everything else: the share of the reference's variation that
the error amounts to (1 - R^2), in the worst group of channels with the same units.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from torchship import difference
from torchship.artifact import tensorfile
from torchship.artifact.manifest import Evidence, Verdict
from torchship.optimize.laws import Law, broken
from torchship.optimize.yardstick import FEWEST_ROWS, Yardstick, centred, rows_first, size_of
from torchship.stage import Stage
from torchship.tensors import FLOATS, Array, Signature, Tensors

PLAN = "plan.json"
HOPELESS = 1e9  # the error of an output that cannot be compared; JSON has no infinity
FEWEST_GROUPS = 20  # a 95 % quantile of fewer is a guess
_SURE = 1.645  # standard deviations of a one-sided 95 % bound
_RESAMPLES = 1000
_WORST = 99.0  # the percentile of rows that stands for the worst
_LOST = 0.5  # of the variation of a row or a channel: the rest is noise
_OTHER = 0.75  # of the integers of made-up rows
_FLOOR = 0.1  # of the median row: what is nearly zero by chance is judged by this
_FEW = 10  # flips
_FLIP = 0.2  # what a flip costs at least in the bound: benchmarks.guard has what less and more of it would cover
_CLOSEST = 0.1  # the share of rows that are likeliest to flip


class JudgedBatch(msgspec.Struct, frozen=True):
    """One judged batch: real rows, made-up ones (`finite`: held to be numbers, no more), or the probe of a law."""

    kind: Literal["real", "made", "finite", "law"]
    law: Law | None = None


class JudgedSet(msgspec.Struct, frozen=True):
    """What candidates are judged on: the kind of each numbered batch in the reference's folder (the first law is the
    base batch of the others), how to read the outputs, and the group of each real row."""

    entries: tuple[JudgedBatch, ...]
    yards: tuple[Yardstick, ...]
    groups: tuple[int, ...] | None = None
    rows: int = 0


def judged(stage: Stage, folder: Path, *, signature: Signature, law_limit: float) -> Verdict:
    """The measured difference of a stage from the reference whose inputs, outputs and plan lie in `folder`."""
    plan = msgspec.json.decode((folder / PLAN).read_bytes(), type=JudgedSet)

    def kept(index: int, what: str) -> Tensors:
        return tensorfile.load(folder / f"{index}.{what}.safetensors")

    real = [index for index, entry in enumerate(plan.entries) if entry.kind == "real"]
    wanted, given = (kept(index, "out") for index in real), (stage(kept(index, "in")) for index in real)
    found = compare(wanted, given, signature=signature, yards=plan.yards, groups=plan.groups)
    if not found.passed or found.evidence is None:
        return found
    made, fault, base = 0.0, found.evidence.broken, None
    for index, entry in enumerate(plan.entries):
        if entry.kind == "real" or (entry.law and fault):
            continue
        reference, answer = kept(index, "out"), stage(kept(index, "in"))
        if entry.law is None:
            if odd := fault_of(reference, answer, signature=signature):
                return msgspec.structs.replace(found, passed=False, error=HOPELESS, reason=odd, evidence=None)
            floats = [spec.name for spec in signature.outputs if spec.dtype in FLOATS and entry.kind == "made"]
            # of each output as a whole: made-up rows have no scale of their own
            made = max([made, *(difference.relative_error(reference[name], answer[name]) for name in floats)])
            if entry.kind == "made":
                fault = fault or _other_integers(reference, answer, signature=signature)
        elif base is None:
            base = answer
        else:
            fault = broken(entry.law, wanted=reference, found=answer, base=base, signature=signature, limit=law_limit)
    evidence = msgspec.structs.replace(found.evidence, made=min(made, HOPELESS), broken=fault)
    return msgspec.structs.replace(found, evidence=evidence)


def _other_integers(wanted: Tensors, found: Tensors, *, signature: Signature) -> str:
    """Which output lost its integers on made-up rows. Noise flips some; what is the same everywhere may be a tie."""
    for spec in signature.outputs:
        a, b = wanted[spec.name], found[spec.name]
        if spec.dtype not in FLOATS and a.size and (a != a.flat[0]).any():
            differ = 1 - difference.share_equal(a, b)
            if differ > _OTHER:
                return f"output {spec.name!r}: {differ:.0%} of its integers on made-up rows are not the reference's"
    return ""


class Meter:
    """Takes in the answers of one output, batch by batch."""

    def __init__(self, yard: Yardstick) -> None:
        self.yard = yard
        self.costs: list[Array] = []  # [rows, units]
        self.drifts: list[Array] = []
        self.row_shares: list[Array] = []
        self.gaps: list[Array] = []
        self.pairs: list[tuple[Array, Array]] = []
        self.hits = 0
        self.lost = [np.zeros(len(part.scales)) for part in yard.channels]
        self.squares = np.zeros(3)  # of the difference, the reference, the candidate
        self.product = 0.0
        self.rows = 0

    def add(self, wanted: Array, found: Array) -> None:
        """One batch of real rows [rows, ...], without odd places."""
        self.rows += len(wanted)
        if self.yard.kind == "labels":
            differ = (wanted != found).reshape(len(wanted), -1)
            self.costs.append(differ.mean(1, keepdims=True) if differ.shape[1] else np.zeros((len(wanted), 1)))
            return
        a, b = (np.nan_to_num(side.astype(np.float64), posinf=0.0, neginf=0.0) for side in (wanted, found))
        self.squares += (np.square(a - b).sum(), np.square(a).sum(), np.square(b).sum())
        self.product += float(a.ravel() @ b.ravel())
        scales = np.maximum(size_of(a), _FLOOR * self.yard.norm)
        self.drifts.append(size_of(a - b) / np.where(scales > 0, scales, 1.0))
        if self.yard.kind == "scores":
            self._scores(wanted, found, a, b)
        elif self.yard.kind == "embedding":
            self.pairs.append((a, b))
        else:
            self._values(a, b)

    def _scores(self, wanted: Array, found: Array, a: Array, b: Array) -> None:
        chances = self.yard.probabilities(wanted)
        best, chosen = chances.argmax(1), found.astype(np.float64).argmax(1)
        every = np.arange(len(chances))
        self.hits += int((best == chosen).sum())
        first_two = np.partition(chances, -2, axis=1)
        self.gaps.append(first_two[:, -1] - first_two[:, -2])
        self.costs.append((chances[every, best] - chances[every, chosen])[:, None])
        own = np.square(centred(a)).sum(1)
        self.row_shares.append(np.square(centred(a) - centred(b)).sum(1) / np.where(own > 0, own, 1.0))

    def _values(self, a: Array, b: Array) -> None:
        errors, costs = np.square(a - b), []
        for index, part in enumerate(self.yard.channels):
            scales, units = np.square(part.scales), np.array(part.units)
            shares = part.split(errors) / np.where(scales > 0, scales, 1.0)
            each = shares.mean(1) if shares.shape[1] else np.zeros((len(a), len(scales)))  # [rows, channels]
            self.lost[index] += each.sum(0)
            costs += [each[:, units == unit].mean(1) for unit in sorted(set(part.units))]
        self.costs.append(np.stack(costs, axis=1))
        if a[:1].size > 1:
            scales = np.maximum(size_of(centred(a)), _FLOOR * self.yard.spread)
            self.row_shares.append(errors.reshape(len(a), -1).mean(1) / np.where(scales > 0, np.square(scales), 1.0))
        else:
            self.row_shares.append(costs[0])

    def evidence(self, groups: Array | None) -> Evidence:
        """What all rows say; of the columns of costs (groups of channels) the one with the highest bound."""
        yard, drift = self.yard, _worst(self.drifts)
        broken = self._broken()
        if yard.kind == "embedding" and self.pairs:
            self.costs = [_neighbours(*(np.concatenate(side) for side in zip(*self.pairs, strict=True)))]
        if not yard.varies or self.rows < FEWEST_ROWS or not self.costs:
            if yard.kind == "labels":  # too few rows for a share of them, but not for other integers altogether
                drift = _worst([cost[:, 0] for cost in self.costs])
            return Evidence(output=yard.name, drift=drift, rows=self.rows, broken=broken if yard.varies else "")
        costs = np.concatenate(self.costs)
        measure = {"scores": "top-1", "embedding": "neighbours", "labels": "equality", "values": "variation"}[yard.kind]
        if yard.kind == "scores":  # one column
            charged = np.where(costs[:, 0] > 0, np.maximum(costs[:, 0], _FLIP), 0.0)
            flips, gaps = charged[charged > 0], np.sort(np.concatenate(self.gaps))
            # a flip costs what those that were seen do, else what the rows that are nearest to a tie would
            event = flips.mean() if len(flips) else max(_FLIP, gaps[: max(1, int(len(gaps) * _CLOSEST))].mean())
            worst = bounded(charged, groups=groups, event=float(event))
            worst = msgspec.structs.replace(worst, cost=float(costs.mean()))
        else:
            found = [bounded(column, groups=groups, event=float(yard.kind == "labels")) for column in costs.T]
            worst = max(found, key=lambda part: part.bound)
        return msgspec.structs.replace(worst, measure=measure, output=yard.name, drift=drift, broken=broken)

    def _broken(self) -> str:
        """Which row or channel is lost altogether, whatever the mean says."""
        if not self.row_shares or self.rows < FEWEST_ROWS or not self.yard.varies:
            return ""
        shares = np.concatenate(self.row_shares)
        if self.yard.kind == "scores":
            mean = math.sqrt(float(shares.mean()))
            return f"the scores are off by {mean:.0%} of their own spread" if mean > _LOST else ""
        worst = math.sqrt(_worst([shares]))
        if worst > _LOST:
            return f"a row is off by {worst:.3g} times what its answers vary by"
        for part, lost in zip(self.yard.channels, self.lost, strict=True):
            share = np.sqrt(lost / max(1, self.rows))
            if len(share) and share.max() > _LOST:
                where = f"channel {int(share.argmax())} of axis {part.axis}" if part.axis is not None else "it"
                return f"{where} is off by {share.max():.3g} times what it varies by"
        return ""


def _worst(parts: Sequence[Array]) -> float:
    values = np.concatenate(parts) if parts else np.zeros(0)
    return min(HOPELESS, float(np.percentile(values, _WORST, method="higher"))) if len(values) else 0.0


def _neighbours(wanted: Array, found: Array) -> Array:
    """[rows, 1]: the share of its closeness that each row loses with the neighbour that the candidate finds for it."""
    true, given = wanted @ wanted.T, found @ found.T
    np.fill_diagonal(true, -np.inf)
    np.fill_diagonal(given, -np.inf)
    rows = np.arange(len(true))
    best, chosen = true.max(1), true[rows, given.argmax(1)]
    np.fill_diagonal(true, np.nan)
    room = best - np.nanmean(true, axis=1)
    lost: Array = ((best - chosen) / np.where(room > 1e-9, room, 1.0))[:, None]
    return lost


def bounded(costs: Array, *, groups: Array | None, event: float) -> Evidence:
    """The mean of per-row costs and the value that it lies under with 95 % certainty, for rows of the same kind.

    By bootstrap over rows, or over `groups` (a number for each row) where rows belong together. Few flips that were
    seen, or none, may be luck: as many groups with flips as a Poisson variable would hide are counted, at the mean of
    those that were seen, or else at `event` for one row (0: costs come with every row).
    """
    members = np.arange(len(costs)) if groups is None else np.unique(groups, return_inverse=True)[1]
    sums, sizes = np.bincount(members, costs), np.bincount(members)
    random = np.random.default_rng(0)
    picks = random.integers(0, len(sums), (_RESAMPLES, len(sums)))
    means = sums[picks].sum(1) / sizes[picks].sum(1)
    mean = float(costs.mean())
    # the spread that rows (which count as independent) would need for what the groups show
    spread = float(means.std()) * math.sqrt(len(costs))
    flipped = (sums / sizes)[sums > 0] if event else sums[:0]
    each = float(flipped.mean()) if len(flipped) else event * len(sums) / len(costs)
    bound = max(float(np.percentile(means, 95)), _by_events(len(flipped), each, len(sums)))
    return Evidence(
        cost=mean,
        bound=max(mean, bound),
        rows=len(costs),
        groups=len(sums),
        spread=spread,
        events=len(flipped),
        event=each,
    )


def _by_events(events: float, event: float, groups: float) -> float:
    """The bound that few flips allow: the 95 % upper limit of a Poisson mean of which `events` were seen (3.0 for none,
    within 2 %), at `event` each. Where there are more, the bootstrap has seen enough of them."""
    return (events + _SURE * math.sqrt(events + 1) + 1.355) * event / groups if event and events < _FEW else 0.0


def rows_needed(found: Evidence, *, most: float) -> int:
    """How many rows would prove a cost of at most `most`, if they were like these; 0 where none would."""
    rows = float(max(found.rows, FEWEST_GROUPS * found.rows / max(1, found.groups)))
    charged = found.events * found.event / max(1, found.groups) if found.measure == "top-1" else 0.0
    mean = max(found.cost, charged)
    while rows < 1e7:
        share = rows / max(1, found.rows)
        by_mean = mean + _SURE * found.spread / math.sqrt(rows)
        by_events = _by_events(found.events * share, found.event, found.groups * share)
        if max(by_mean, by_events) <= most:
            return math.ceil(rows)
        rows *= 1.1
    return 0


def compare(
    reference: Iterable[Tensors],
    candidate: Iterable[Tensors],
    *,
    signature: Signature,
    yards: Sequence[Yardstick],
    groups: Sequence[int] | None = None,
) -> Verdict:
    """The measured difference of two runs over the same batches of real rows, not yet held to a limit.

    `passed` is False, with the reason, for a wrong name, shape or dtype, and for NaN or infinity that stands elsewhere
    than in the reference.
    """
    meters = [Meter(yard) for yard in yards]
    for expected, given in zip(reference, candidate, strict=True):
        fault = fault_of(expected, given, signature=signature)
        if fault:
            return Verdict(passed=False, error=HOPELESS, cosine=0.0, reason=fault)
        for meter in meters:
            name = meter.yard.name
            meter.add(*(rows_first(side[name], batched=signature.batched) for side in (expected, given)))
    rows = max((meter.rows for meter in meters), default=0)
    together = None if groups is None else np.asarray(groups[:rows])
    norms = [(meter.product, *np.sqrt(meter.squares).tolist()) for meter in meters]
    scored = [meter for meter in meters if meter.yard.kind == "scores"]
    return Verdict(
        passed=True,
        error=min(max((apart / own if own else apart for _, apart, own, _ in norms), default=0.0), HOPELESS),
        cosine=min(
            (product / (own * other) if own * other else float(not apart) for product, apart, own, other in norms),
            default=1.0,
        ),
        top1=min((meter.hits / meter.rows for meter in scored if meter.rows), default=None),
        evidence=_worst_of([meter.evidence(together) for meter in meters]),
    )


def _worst_of(found: Sequence[Evidence]) -> Evidence:
    """The output that costs most; what any of them broke, and the largest drift of all."""
    if not found:
        return Evidence()
    worst = max(found, key=lambda part: (bool(part.measure), part.bound))
    broken = next((f"output {part.output!r}: {part.broken}" for part in found if part.broken), "")
    drift = max((part.drift for part in found if part.measure not in ("top-1", "neighbours")), default=0.0)
    all_drift = max(part.drift for part in found)
    return msgspec.structs.replace(worst, broken=broken, drift=all_drift, value_drift=drift)


def fault_of(expected: Tensors, given: Tensors, *, signature: Signature) -> str:
    """What forbids to compare two answers: a name, a shape, a dtype, a place that only one side has no number in."""
    for spec in signature.outputs:
        wanted, found = expected[spec.name], given.get(spec.name)
        if found is None:
            return f"output {spec.name!r} is missing"
        if wanted.shape != found.shape:
            return f"output {spec.name!r} has shape {list(found.shape)}, the reference {list(wanted.shape)}"
        if wanted.dtype != found.dtype:
            return f"output {spec.name!r} is {found.dtype}, the reference {wanted.dtype}"
        odd = difference.odd_places(wanted, found)
        if odd.any():
            count = f"{int(odd.sum())} of {odd.size} places"
            new = bool((~np.isfinite(found.astype(np.float64)))[odd].any())
            words = "where the reference has none" if new else "fewer than the reference"
            return f"output {spec.name!r} holds NaN or infinity in {count} {words}"
    return ""
