"""Whether a face is good enough to be enrolled, and if not, why."""

from __future__ import annotations

from typing import TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float32]


class Gate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The least that enrolment asks for: detection score, size in pixels, sharpness, and how far the head may turn.

    Sharpness 45 is a face whose vector keeps a similarity of about 0.9 to that of the sharp picture, as measured by
    shrinking and enlarging pictures.
    """

    score: float = 0.9
    side: float = 60.0
    sharpness: float = 45.0
    yaw: float = 0.75
    pitch: float = 0.6


def measure(chip: NDArray[np.uint8], points: Floats, box: Floats) -> Floats:
    """Size in pixels of the picture, sharpness, yaw and pitch of one face, shape (4,).

    Sharpness is the variance of the Laplacian of the grey chip. Yaw and pitch are read from the five points: 0 is
    straight ahead, 1 a nose above an eye, or on the line of the eyes or of the mouth (about 60 degrees).
    """
    grey = chip.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    laplacian = grey[1:-1, :-2] + grey[1:-1, 2:] + grey[:-2, 1:-1] + grey[2:, 1:-1] - 4 * grey[1:-1, 1:-1]
    border = len(grey) // 8
    sharpness = float(laplacian[border:-border, border:-border].var())
    yaw, pitch = turn(points)
    side = float(min(box[2] - box[0], box[3] - box[1]))
    return np.array([side, sharpness, yaw, pitch], np.float32)


def turn(points: Floats) -> tuple[float, float]:
    """Yaw and pitch of a face by its five points: right is positive, down is positive."""
    left_eye, right_eye, nose, left_mouth, right_mouth = points.astype(np.float64)
    across = right_eye - left_eye + right_mouth - left_mouth
    width = float(np.linalg.norm(across)) / 2
    if width < 1e-6:
        return 1.0, 1.0
    across = across / (2 * width)
    eyes, mouth = (left_eye + right_eye) / 2, (left_mouth + right_mouth) / 2
    down = np.array([-across[1], across[0]])
    height = float((mouth - eyes) @ down)
    middle = (eyes + mouth) / 2
    yaw = float((nose - middle) @ across) / (width / 2)
    share = float((nose - eyes) @ down) / height if abs(height) > 1e-6 else 1.0
    return yaw, (share - 0.55) / 0.5


def refusal(quality: Floats, score: float, *, gate: Gate) -> str:
    """Why a face is refused, in one sentence; empty when it is good enough."""
    side, sharpness, yaw, pitch = (float(value) for value in quality)
    if score < gate.score:
        return f"the detector is not sure that this is a face (score {score:.2f}, at least {gate.score:g} is needed)"
    if side < gate.side:
        return f"the face is too small ({side:.0f} pixels, at least {gate.side:.0f} are needed)"
    if sharpness < gate.sharpness:
        return f"the face is blurred (sharpness {sharpness:.0f}, at least {gate.sharpness:.0f} is needed)"
    if abs(yaw) > gate.yaw:
        side_word = "right" if yaw > 0 else "left"
        return f"the head is turned to the {side_word} of the picture ({abs(yaw):.2f}, at most {gate.yaw:g})"
    if abs(pitch) > gate.pitch:
        return f"the head is tilted {'down' if pitch > 0 else 'up'} ({abs(pitch):.2f}, at most {gate.pitch:g})"
    return ""


def grade(quality: Floats, score: float) -> float:
    """One number from 0 to 1 for a face: the least of its score, size, sharpness and straightness."""
    side, sharpness, yaw, pitch = (float(value) for value in quality)
    parts = (score, side / 160, sharpness / 300, 1 - abs(yaw), 1 - abs(pitch))
    return float(np.clip(min(parts), 0.0, 1.0))
