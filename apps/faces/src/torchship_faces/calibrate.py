"""A threshold for a wished false-match rate, out of the similarities of pairs, and how sure one can be of it.

False matches are counted over impostor pairs, false non-matches over genuine pairs (ISO/IEC 19795-1). Pairs of one
person are not independent: the threshold's interval is a bootstrap over persons; rates carry Wilson intervals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from torchship.errors import BadInput

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Pairs:
    """Similarities of genuine and impostor pairs, and of each impostor pair the two persons' numbers."""

    genuine: Floats
    impostor: Floats
    impostor_persons: NDArray[np.int64]
    persons: int


class Rate(msgspec.Struct, frozen=True):
    """A share of trials with its 95 % interval (Wilson 1927)."""

    value: float
    low: float
    high: float
    trials: int


class Calibration(msgspec.Struct, frozen=True):
    """The threshold for `target`, its 95 % interval, the rates there; `note` says when the data cannot prove them."""

    target: float
    threshold: float
    threshold_low: float
    threshold_high: float
    false_match: Rate
    false_non_match: Rate
    persons: int
    note: str = ""


def pairs_of(vectors: NDArray[np.float32], persons: Sequence[int]) -> Pairs:
    """All pairs of unit vectors (n, width), `persons[i]` being whose vector i is.

    Raises BadInput unless there is at least one genuine and one impostor pair.
    """
    owner = np.asarray(persons, np.int64)
    first, second = np.triu_indices(len(owner), 1)
    scores = (vectors @ vectors.T)[first, second].astype(np.float64)
    same = owner[first] == owner[second]
    if not same.any() or same.all():
        raise BadInput(
            "calibration needs two pictures of one person, and pictures of two persons",
            hint="give a folder with one folder of pictures for each person",
        )
    both = np.stack([owner[first], owner[second]], 1)
    return Pairs(scores[same], scores[~same], both[~same], int(owner.max()) + 1)


def calibrate(pairs: Pairs, *, target: float, rounds: int = 500, seed: int = 0) -> Calibration:
    """The lowest threshold whose false-match rate on the impostor pairs is at most `target`."""
    if not 0 < target < 1:
        raise BadInput(f"the false-match rate is {target}, expected a number between 0 and 1")
    threshold = _threshold(pairs.impostor, np.ones(len(pairs.impostor)), target)
    random = np.random.default_rng(seed)
    drawn = []
    for _ in range(rounds):
        weight = np.bincount(random.integers(0, pairs.persons, pairs.persons), minlength=pairs.persons)
        weights = weight[pairs.impostor_persons].prod(1).astype(np.float64)
        if weights.any():
            drawn.append(_threshold(pairs.impostor, weights, target))
    low, high = np.quantile(drawn, [0.025, 0.975]) if drawn else (threshold, threshold)
    wanted = math.ceil(3 / target)
    note = ""
    if len(pairs.impostor) < wanted:
        note = (
            f"{len(pairs.impostor)} impostor pairs cannot prove a rate of {target:g}: "
            f"at least {wanted} are needed (rule of three); the threshold is a lower bound"
        )
    return Calibration(
        target=target,
        threshold=threshold,
        threshold_low=float(low),
        threshold_high=float(high),
        false_match=rate(int((pairs.impostor >= threshold).sum()), len(pairs.impostor)),
        false_non_match=rate(int((pairs.genuine < threshold).sum()), len(pairs.genuine)),
        persons=pairs.persons,
        note=note,
    )


def _threshold(impostor: Floats, weights: Floats, target: float) -> float:
    order = np.argsort(-impostor, kind="stable")
    share = np.cumsum(weights[order]) / weights.sum()
    allowed = int(np.searchsorted(share, target * (1 + 1e-12), side="right"))
    if allowed >= len(order):
        return -1.0
    return float(np.nextafter(impostor[order[allowed]], 2.0))


def rate(hits: int, trials: int) -> Rate:
    """A share with Wilson's interval at 95 %."""
    if not trials:
        return Rate(0.0, 0.0, 1.0, 0)
    z = 1.959964
    share = hits / trials
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / (1 + z * z / trials)
    return Rate(share, max(0.0, middle - half), min(1.0, middle + half), trials)


def roc_svg(pairs: Pairs, found: Calibration) -> str:
    """The ROC as an SVG: true-match rate over false-match rate (logarithmic), the chosen threshold marked."""
    thresholds = np.unique(np.concatenate([pairs.genuine, pairs.impostor]))
    if len(thresholds) > 400:
        thresholds = np.quantile(thresholds, np.linspace(0, 1, 400))
    floor = min(found.target, 1 / len(pairs.impostor)) / 2
    decades = max(1, math.ceil(-math.log10(floor)))

    def place(false_match: float, true_match: float) -> tuple[float, float]:
        across = (math.log10(max(false_match, 10.0**-decades)) + decades) / decades
        return 70 + 500 * across, 30 + 340 * (1 - true_match)

    points = [
        place(float((pairs.impostor >= t).mean()), float((pairs.genuine >= t).mean())) for t in [*thresholds, 2.0]
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    grid = []
    for n in range(decades + 1):
        across, name = 70 + 500 * n / decades, f"1e-{decades - n}" if n < decades else "1"
        grid.append(f'<line x1="{across:.0f}" y1="30" x2="{across:.0f}" y2="370" class="g"/>')
        grid.append(f'<text x="{across:.0f}" y="390" text-anchor="middle">{name}</text>')
    for n in range(6):
        grid.append(f'<line x1="70" y1="{30 + 68 * n}" x2="570" y2="{30 + 68 * n}" class="g"/>')
        grid.append(f'<text x="62" y="{34 + 68 * n}" text-anchor="end">{1 - n / 5:.1f}</text>')
    x, y = place(found.false_match.value, 1 - found.false_non_match.value)
    label = (
        f"threshold {found.threshold:.3f} [{found.threshold_low:.3f}, {found.threshold_high:.3f}], "
        f"false matches {found.false_match.value:.2g} of {found.false_match.trials} pairs, "
        f"true matches {1 - found.false_non_match.value:.3f} of {found.false_non_match.trials}"
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" width="620" height="450" font-family="sans-serif" font-size="12">'
        "<style>.g{stroke:#ddd}</style><rect width='620' height='450' fill='white'/>"
        + "".join(grid)
        + f'<polyline points="{line}" fill="none" stroke="#1f6feb" stroke-width="2"/>'
        + f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="#d1242f"/>'
        + '<text x="320" y="412" text-anchor="middle">false-match rate</text>'
        + '<text x="18" y="200" transform="rotate(-90 18 200)" text-anchor="middle">true-match rate</text>'
        + f'<text x="320" y="437" text-anchor="middle">{label}</text></svg>\n'
    )
