"""Where faces lie and how they are turned upright: anchors and the 5-point similarity."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from torchship.stages.boxes import nms

Floats = NDArray[np.float32]
_STRIDES = ((8, (16, 32)), (16, (64, 128)), (32, (256, 512)))
_CENTRE, _SIZE = 0.1, 0.2
# Eyes, nose and corners of the mouth in a 112 x 112 chip, as ArcFace (Deng et al. 2019) and its kin are trained.
TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]], np.float32
)
# The same five of dlib's mean face (68 points, of which the eyes are the means of six), with its border of a quarter.
_DLIB = np.array(
    [[0.225492, 0.215990], [0.754761, 0.215990], [0.490127, 0.515625], [0.254149, 0.780233], [0.726104, 0.780233]],
    np.float32,
)
TEMPLATES = {"arcface": TEMPLATE / 112, "dlib": (_DLIB + 0.25) / 1.5}  # as parts of the chip's side


@lru_cache(maxsize=8)
def anchors(side: int) -> Floats:
    """RetinaFace's anchors of a square canvas: centre x, centre y, size in pixels, shape (a, 3)."""
    parts = []
    for stride, sizes in _STRIDES:
        steps = (np.arange(-(-side // stride), dtype=np.float32) + 0.5) * stride
        y, x = np.meshgrid(steps, steps, indexing="ij")
        grid = np.repeat(np.stack([x.ravel(), y.ravel()], 1), len(sizes), axis=0)
        parts.append(np.concatenate([grid, np.tile(np.array(sizes, np.float32), len(grid) // len(sizes))[:, None]], 1))
    found: Floats = np.concatenate(parts)
    found.setflags(write=False)
    return found


def decode(
    loc: Floats, face: Floats, landmarks: Floats, *, side: int, min_score: float, overlap: float, most: int
) -> tuple[Floats, Floats, Floats]:
    """RetinaFace's outputs for one canvas as boxes (n, 4: left, top, right, bottom), scores (n), points (n, 5, 2).

    Pixels of the canvas, best first; boxes that overlap a better one by more than `overlap` (IoU) are dropped.
    """
    chosen = np.flatnonzero(face >= min_score)
    chosen = chosen[np.argsort(-face[chosen], kind="stable")][:5000]
    base, sizes = anchors(side)[chosen, :2], anchors(side)[chosen, 2:]
    centre = base + loc[chosen, :2] * _CENTRE * sizes
    half = np.exp(loc[chosen, 2:] * _SIZE) * sizes / 2
    boxes = np.concatenate([centre - half, centre + half], 1)
    points = base[:, None] + landmarks[chosen].reshape(-1, 5, 2) * _CENTRE * sizes[:, None]
    kept = nms(boxes, face[chosen], overlap=overlap)[:most]
    return boxes[kept], face[chosen][kept], points[kept]


def similarity(source: Floats, target: Floats) -> Floats:
    """The rotation, uniform scale and shift that take `source` (n, 2) closest to `target`, shape (2, 3).

    Least squares without reflection: Umeyama 1991, equations 38 to 43.
    """
    mean_s, mean_t = source.mean(0), target.mean(0)
    centred, aimed = source - mean_s, target - mean_t
    left, stretch, right = np.linalg.svd(aimed.T @ centred / len(source))
    sign = np.array([1.0, np.sign(np.linalg.det(left) * np.linalg.det(right)) or 1.0])
    turn = left @ np.diag(sign) @ right
    variance = float((centred**2).sum() / len(source))
    scale = float((stretch * sign).sum()) / max(variance, 1e-12)
    found: Floats = np.concatenate([scale * turn, (mean_t - scale * turn @ mean_s)[:, None]], 1).astype(np.float32)
    return found


def chip(pixels: NDArray[np.uint8], points: Floats, *, side: int, template: str = "arcface") -> NDArray[np.uint8]:
    """The face with these five points, upright in a square of `side` pixels; outside the picture is black.

    Large faces are reduced by whole pixels first, so that bilinear sampling does not alias.
    """
    forward = similarity(points, TEMPLATES[template] * np.float32(side))
    scale = float(np.hypot(forward[0, 0], forward[1, 0]))
    height, width = pixels.shape[:2]
    corners = np.array([[0, 0, 1], [side, 0, 1], [0, side, 1], [side, side, 1]], np.float64)
    backward = np.linalg.inv(np.vstack([forward, [0, 0, 1]]))[:2]
    reach = corners @ backward.T
    low = np.clip(np.floor(reach.min(0)).astype(int) - 2, 0, [width - 1, height - 1])
    high = np.clip(np.ceil(reach.max(0)).astype(int) + 2, low + 1, [width, height])
    part = Image.fromarray(pixels[low[1] : high[1], low[0] : high[0]])
    factor = max(1, int(1 / max(scale, 1e-6) / 1.5))
    factor = min(factor, *part.size)
    if factor > 1:
        part = part.reduce(factor)
    moved = backward.copy()
    moved[:, 2] -= low
    turned = part.transform(
        (side, side), Image.Transform.AFFINE, tuple((moved / factor).ravel()), Image.Resampling.BILINEAR
    )
    return np.asarray(turned)
