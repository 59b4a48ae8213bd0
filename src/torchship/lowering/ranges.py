"""Range search for activations: which interval eight bits should cover, from what was seen on real data.

`minmax` covers everything; `percentile` cuts both tails; `mse` minimises the squared error of rounding and clipping;
`entropy` minimises the Kullback-Leibler divergence between the distribution and its quantized form (Migacz, "8-bit
inference with TensorRT", GTC 2017). Krishnamoorthi, arXiv:1806.08342, and Nagel et al., arXiv:2106.08295, compare them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from torchship.errors import BadConfig

METHODS = ("minmax", "percentile", "mse", "entropy")
_LEVELS = 256
_BINS = 2048
KEPT = 200_000  # values of one tensor, over all batches
_SHRINK = tuple(np.linspace(1.0, 0.3, 29))

Floats = NDArray[np.float32]


@dataclass
class ObservedRange:
    """What one tensor held over the data: its extremes, and a sample of its values."""

    low: float = float("inf")
    high: float = float("-inf")
    values: list[Floats] = field(default_factory=list)

    def add(self, array: Floats, *, keep: int) -> None:
        """Look at `array`, keeping about `keep` of its values, evenly spread."""
        flat = array.reshape(-1)
        if not flat.size:
            return
        self.low, self.high = min(self.low, float(flat.min())), max(self.high, float(flat.max()))
        self.values.append(flat[:: max(1, flat.size // max(keep, 1))][:keep].copy())

    def sample(self) -> Floats:
        """The values that were kept, at most a few hundred thousand."""
        values = np.concatenate(self.values) if self.values else np.zeros(0, np.float32)
        return values[:: max(1, values.size // KEPT)]


def search(seen: ObservedRange, *, method: str, percentile: float = 99.99) -> tuple[float, float]:
    """The interval for `seen`; always holds zero, which padding and ReLU need exactly. Raises BadConfig."""
    if method not in METHODS:
        raise BadConfig(f"range {method!r} is unknown", hint=f"use one of {', '.join(METHODS)}")
    low, high = min(seen.low, 0.0), max(seen.high, 0.0)
    if seen.low > seen.high or low == high:  # nothing was seen, or only zeros
        return 0.0, 1.0
    if method == "minmax":
        return low, high
    values = seen.sample()
    if method == "percentile":
        below, above = (float(end) for end in np.percentile(values, [100 - percentile, percentile]))
        below, above = min(max(below, low), 0.0), max(min(above, high), 0.0)
        return (below, above) if above > below else (low, high)
    if method == "mse":
        return _by_error(values, low, high)
    return _by_entropy(values, low, high)


def _by_error(values: Floats, low: float, high: float) -> tuple[float, float]:
    """Rounding costs step^2 / 12 for each value inside (zero is exact), clipping its distance squared."""
    counts, edges = np.histogram(values[values != 0], bins=_BINS, range=(low, high))
    middles = (edges[:-1] + edges[1:]) / 2

    def cost(end: tuple[float, float]) -> float:
        beyond = np.maximum(middles - end[1], 0) + np.maximum(end[0] - middles, 0)
        inside = counts[beyond == 0].sum()
        return float(inside * ((end[1] - end[0]) / (_LEVELS - 1)) ** 2 / 12 + np.sum(counts * np.square(beyond)))

    best = (low, high)
    for side in (1, 0, 1):  # the upper end usually matters most; then the lower; then the upper once more
        ends = [(best[0], high * s) if side else (low * s, best[1]) for s in _SHRINK]
        best = min((end for end in ends if end[1] > end[0]), key=cost, default=best)
    return best


def _by_entropy(values: Floats, low: float, high: float) -> tuple[float, float]:
    # zeros are exact at any scale, and a ReLU makes so many that they would outweigh everything else
    counts, edges = np.histogram(values[values != 0], bins=_BINS, range=(low, high))
    middles = (edges[:-1] + edges[1:]) / 2
    spans = [(low * s, high * s) for s in _SHRINK]
    return min(spans, key=lambda span: _divergence(counts.astype(np.float64), middles, span))


def _divergence(counts: NDArray[np.float64], middles: NDArray[np.float64], span: tuple[float, float]) -> float:
    low, high = span
    inside = np.clip(middles, low, high)
    level = np.clip(((inside - low) / (high - low) * _LEVELS).astype(int), 0, _LEVELS - 1)
    within = (middles >= low) & (middles <= high)
    clipped = counts * within
    first, last = np.flatnonzero(within)[[0, -1]]
    clipped[first] += counts[:first].sum()
    clipped[last] += counts[last + 1 :].sum()
    # the quantized distribution spreads each level evenly over its bins that held something
    filled = (counts > 0) & within
    mass = np.bincount(level, weights=counts * within, minlength=_LEVELS)
    bins = np.maximum(np.bincount(level, weights=filled, minlength=_LEVELS), 1)
    spread = np.where(filled, (mass / bins)[level], 0.0)
    p, q = clipped / max(clipped.sum(), 1), spread / max(spread.sum(), 1)
    busy = p > 0
    return float(np.sum(p[busy] * np.log(p[busy] / np.maximum(q[busy], 1e-12))))
