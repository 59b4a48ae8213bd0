"""Trains the small detector on drawn scenes: `python -m examples.detector.train` (minutes on two cores)."""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from torch import nn

from examples.detector.boxes import SIZE
from examples.detector.model import CLASSES, STRIDES, WEIGHTS, Detector, cells
from examples.detector.scenes import scene

_RANGES = ((0, 32), (32, 56), (56, 1000))  # which level takes boxes of which size, in pixels


def targets(boxes: torch.Tensor, kinds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For every cell its class (one-hot, zero for background) and its box."""
    points, strides, low, high = _cells()
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    side = (boxes[:, 2:] - boxes[:, :2]).amax(1)
    near = ((points[:, None] - centres[None]).abs() < 1.2 * strides[:, None, None]).all(2)
    inside = ((points[:, None] > boxes[None, :, :2]) & (points[:, None] < boxes[None, :, 2:])).all(2)
    fits = near & inside & (side[None] >= low[:, None]) & (side[None] < high[:, None])
    owner = fits.float().argmax(1)
    positive = fits.any(1)
    return nn.functional.one_hot(kinds[owner], len(CLASSES)).float() * positive[:, None], boxes[owner]


def _cells() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    every = [cells(SIZE // stride, SIZE // stride, stride) for stride in STRIDES]
    counts = [len(part) for part in every]
    spread = [
        torch.cat([torch.full((count,), float(value)) for count, value in zip(counts, values, strict=True)])
        for values in (STRIDES, [span[0] for span in _RANGES], [span[1] for span in _RANGES])
    ]
    return torch.cat(every), spread[0], spread[1], spread[2]


def loss(boxes: torch.Tensor, scores: torch.Tensor, wanted: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """Focal loss of the scores, and generalized IoU of the boxes in cells that hold one."""
    positive = wanted.amax(2) > 0
    count = positive.sum().clamp(min=1)
    scores = scores.clamp(1e-6, 1 - 1e-6)
    right = scores * wanted + (1 - scores) * (1 - wanted)
    weight = 0.75 * wanted + 0.25 * (1 - wanted)
    focal = -(weight * (1 - right) ** 2 * right.log()).sum() / count
    a, b = boxes[positive], true[positive]
    both = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    hull = (torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])).prod(1)
    union = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - both
    giou = both / union.clamp(min=1e-6) - (hull - union) / hull.clamp(min=1e-6)
    return focal + 2 * (1 - giou).sum() / count


def train(steps: int, *, batch: int = 16, seed: int = 0, device: str = "cpu") -> Detector:
    """A detector trained on `steps` batches of fresh scenes."""
    torch.manual_seed(seed)
    detector = Detector("csp").to(device)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    started = time.monotonic()
    for step in range(steps):
        drawn = [scene(step * batch + index) for index in range(batch)]
        pictures = torch.from_numpy(np.stack([pixels for pixels, _, _ in drawn]))
        pairs = [targets(torch.from_numpy(boxes), torch.from_numpy(kinds)) for _, boxes, kinds in drawn]
        found = detector(pictures.to(device))
        wanted, true = (torch.stack(side).to(device) for side in zip(*pairs, strict=True))
        total = loss(found["boxes"], found["scores"], wanted, true)
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(detector.parameters(), 10.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            print(
                f"step {step + 1}: loss {float(total.detach()):.3f} after {time.monotonic() - started:.0f} s",
                flush=True,
            )
    return detector.cpu().eval()


def main() -> None:
    """Train and keep the weights beside this file, in half precision."""
    from safetensors.torch import save_file

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    detector = train(given.steps, batch=given.batch, device=given.device)
    state = {key: value.half() if value.is_floating_point() else value for key, value in detector.state_dict().items()}
    save_file({key: value.contiguous() for key, value in state.items()}, WEIGHTS)
    print(f"wrote {WEIGHTS}")


if __name__ == "__main__":
    main()
