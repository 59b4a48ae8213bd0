"""How far two arrays differ: one measure, with one treatment of NaN and infinity, for everybody who compares answers.

NaN beside NaN and an infinity beside the same infinity are equal. Where only one side holds such a value, or another
one, the place is *odd*, and whoever measures gets an infinite error. All sums run in FP64.
"""

from __future__ import annotations

import numpy as np

from torchship.tensors import Array


def odd_places(wanted: Array, found: Array) -> Array:
    """Where NaN or infinity stand in one of two arrays of one shape, and not, or another one, in the other: BOOL."""
    if wanted.dtype.kind in "biuO":
        return np.zeros(wanted.shape, bool)
    a, b = wanted.astype(np.float64), found.astype(np.float64)
    same = (np.isfinite(a) & np.isfinite(b)) | (a == b) | (np.isnan(a) & np.isnan(b))
    return np.asarray(~same)


def relative_error(wanted: Array, found: Array) -> float:
    """L2 norm of the difference over that of `wanted`; absolute where `wanted` is zero throughout.

    Infinite where shapes differ or a place is odd; 0 for empty arrays.
    """
    if wanted.shape != found.shape or odd_places(wanted, found).any():
        return float("inf")
    a, b = _finite(wanted, found)
    scale = float(np.linalg.norm(a))
    return float(np.linalg.norm(a - b)) / (scale or 1.0)


def row_errors(wanted: Array, found: Array, *, floor: float = 0.0) -> Array:
    """The relative error of each row along axis 0, FP64 [rows]; a row with an odd place has an infinite one.

    A row's norm counts as at least `floor` times the median row's, so that a row that is nearly zero by chance is not
    judged by its own smallness.
    """
    rows = wanted.shape[0]
    a, b = (side.reshape(rows, -1) for side in _finite(wanted, found))
    scales = np.linalg.norm(a, axis=1)
    scales = np.maximum(scales, floor * (np.median(scales) if rows else 0.0))
    errors: Array = np.linalg.norm(a - b, axis=1) / np.where(scales > 0, scales, 1.0)
    errors[odd_places(wanted, found).reshape(rows, -1).any(1)] = np.inf
    return errors


def cosine(wanted: Array, found: Array) -> float:
    """Cosine similarity over the places that are finite in both; 1 for two arrays of zeros."""
    a, b = _finite(wanted, found)
    scale = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a.ravel() @ b.ravel()) / scale if scale > 0 else float(np.array_equal(a, b))


def share_equal(wanted: Array, found: Array) -> float:
    """The share of places that hold equal values: for integers, truths and BYTES; 0 where shapes differ."""
    if wanted.shape != found.shape:
        return 0.0
    return float(np.mean(wanted == found)) if wanted.size else 1.0


def is_close(wanted: Array, found: Array, *, tolerance: float) -> bool:
    """Whether two arrays are equal but for rounding: within `tolerance` of the norm of `wanted` (or 1e-6), no place
    odd; of integers and truths 99 % must be the same.
    """
    if wanted.shape != found.shape:
        return False
    if wanted.dtype.kind in "biuO":
        return share_equal(wanted, found) > 0.99
    if odd_places(wanted, found).any():
        return False
    a, b = _finite(wanted, found)
    return bool(np.linalg.norm(a - b) <= tolerance * np.linalg.norm(a) + 1e-6)


def _finite(wanted: Array, found: Array) -> tuple[Array, Array]:
    """Both in FP64, with zeros in the places that are not finite on either side."""
    a, b = wanted.astype(np.float64), found.astype(np.float64)
    seen = np.isfinite(a) & np.isfinite(b)
    return np.where(seen, a, 0.0), np.where(seen, b, 0.0)
