"""The ready-made stages against the code they replace: torchvision's transforms and operators, in one run, one thread.

    python -m benchmarks.stages

Each pair runs in turns, so that noise meets both; the table shows the best of all rounds in milliseconds.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

ROUNDS = 25


def photo(width: int, height: int) -> bytes:
    """A JPEG with the detail of a real photo."""
    import skimage.data

    picture = Image.fromarray(np.asarray(skimage.data.astronaut())).resize((width, height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def classify_pair(data: bytes, *, fast: bool) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Bytes to normalized pixels: ours, and torchvision's as its documentation shows it."""
    import torch
    from torchvision.transforms import v2

    from torchship.stages.images import IMAGENET_MEAN, IMAGENET_STD, Classify

    theirs = v2.Compose([
        v2.Resize(256, antialias=True), v2.CenterCrop(224), v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ])  # fmt: skip
    rows = np.empty(1, object)
    rows[0] = data
    stage = Classify(fast=fast)
    return lambda: stage(rows), lambda: theirs(Image.open(io.BytesIO(data)).convert("RGB"))


def boxes_pair(count: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Suppression of `count` boxes of 80 classes."""
    import torch
    from torchvision.ops import batched_nms

    from torchship.stages.boxes import nms

    random = np.random.default_rng(0)
    low = random.uniform(0, 600, (count, 2))
    boxes = np.concatenate([low, low + random.uniform(20, 100, (count, 2))], 1).astype(np.float32)
    scores, classes = random.random(count).astype(np.float32), random.integers(0, 80, count)
    tensors = tuple(map(torch.from_numpy, (boxes, scores, classes)))
    return lambda: nms(boxes, scores, groups=classes, overlap=0.45), lambda: batched_nms(*tensors, 0.45)


def top_pair() -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Softmax and the best five of 1,000 classes for 8 rows."""
    import torch

    from torchship.stages.labels import activate, top

    logits = np.random.default_rng(0).normal(size=(8, 1000)).astype(np.float32)
    tensor = torch.from_numpy(logits)
    return lambda: top(activate(logits, "softmax"), 5), lambda: tensor.softmax(1).topk(5)


def race(ours: Callable[[], Any], theirs: Callable[[], Any]) -> tuple[float, float]:
    """The best time of each in milliseconds, taken in turns."""
    best = [float("inf"), float("inf")]
    for _ in range(ROUNDS):
        for place, run in enumerate((ours, theirs)):
            started = time.perf_counter()
            run()
            best[place] = min(best[place], (time.perf_counter() - started) * 1000)
    return best[0], best[1]


def main() -> None:
    """Print the table and the line for machines."""
    import torch

    torch.set_num_threads(1)
    small, large = photo(640, 480), photo(1920, 1080)
    pairs = {
        "jpeg_640": ("JPEG 640x480 to 224x224, exact", classify_pair(small, fast=False)),
        "jpeg_1080p": ("JPEG 1920x1080, exact", classify_pair(large, fast=False)),
        "jpeg_1080p_fast": ("JPEG 1920x1080, fast=true", classify_pair(large, fast=True)),
        "nms_300": ("suppression, 300 boxes of 80 classes", boxes_pair(300)),
        "nms_3000": ("suppression, 3,000 boxes", boxes_pair(3000)),
        "top5": ("softmax and top 5 of 1,000, 8 rows", top_pair()),
    }
    table = Table("stage", "torchship ms", "torchvision / torch ms", "ratio", box=None)
    facts = []
    for key, (name, (ours, theirs)) in pairs.items():
        mine, other = race(ours, theirs)
        table.add_row(name, f"{mine:.2f}", f"{other:.2f}", f"{other / mine:.2f}x")
        facts.append(f"{key}_x={other / mine:.2f}")
    Console().print(table)
    print(" ".join(facts))


if __name__ == "__main__":
    main()
