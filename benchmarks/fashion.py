"""Fashion-MNIST from Debian's package, and the two classifiers that are trained on it once and then cached."""

from __future__ import annotations

import contextlib
import gzip
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

PACKAGE = "dataset-fashion-mnist"
_SYSTEM = Path("/usr/share/datasets/fashion-mnist")
_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
_BATCH = 128
HELD_BACK = 5000  # of the 60,000 training pictures: the search judges on these, the test pictures only report


def cache() -> Path:
    """Where data and weights are kept: `$TORCHSHIP_BENCHMARKS` or `~/.cache/torchship/benchmarks`."""
    path = Path(os.environ.get("TORCHSHIP_BENCHMARKS") or Path.home() / ".cache" / "torchship" / "benchmarks")
    path.mkdir(parents=True, exist_ok=True)
    return path


def folder() -> Path:
    """The four files; unpacked without root from Debian's package into the cache when the system has none."""
    if _SYSTEM.is_dir():
        return _SYSTEM
    place = cache() / "fashion-mnist"
    found = place / _SYSTEM.relative_to("/")
    if all((found / name).exists() for name in _FILES):
        return found
    if not shutil.which("apt-get"):
        raise SystemExit(f"there is no Fashion-MNIST: put {', '.join(_FILES)} into {found}")
    place.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", PACKAGE], cwd=place, check=True, stdout=subprocess.DEVNULL)
    for package in place.glob(f"{PACKAGE}*.deb"):
        subprocess.run(["dpkg-deb", "-x", str(package), str(place)], check=True)
        package.unlink()
    return found


def pictures(part: str) -> tuple[Any, Any]:
    """Pictures FP32 [rows, 1, 28, 28], normalized, and labels INT64 [rows], of `train` or `t10k`."""
    place = folder()
    with gzip.open(place / f"{part}-images-idx3-ubyte.gz") as file:
        raw = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    with gzip.open(place / f"{part}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8).astype(np.int64)
    return (raw.astype(np.float32) / 255 - 0.286) / 0.353, labels


def module(name: str) -> Any:
    """`resnet`: ResNet-18 at half width; `mobilenet_v3`: torchvision's small one; both for one channel of 28x28."""
    import torch
    import torchvision

    torch.manual_seed(0)
    if name == "mobilenet_v3":
        net = torchvision.models.mobilenet_v3_small(weights=None, num_classes=10)
        net.features[0][0] = torch.nn.Conv2d(1, 16, 3, padding=1, bias=False)
        return net
    net = torchvision.models.resnet18(weights=None, num_classes=10)
    net.conv1 = torch.nn.Conv2d(1, 64, 3, stride=2, padding=1, bias=False)
    net.maxpool = torch.nn.Identity()
    return _halved(net)


def _halved(net: Any) -> Any:
    """Half as many channels everywhere."""
    import torch

    for path, part in list(net.named_modules()):
        if isinstance(part, torch.nn.Conv2d):
            given = part.in_channels if part.in_channels == 1 else part.in_channels // 2
            form: dict[str, Any] = {"kernel_size": part.kernel_size, "stride": part.stride, "padding": part.padding}
            fresh: Any = torch.nn.Conv2d(given, part.out_channels // 2, bias=False, **form)
        elif isinstance(part, torch.nn.BatchNorm2d):
            fresh = torch.nn.BatchNorm2d(part.num_features // 2)
        else:
            continue
        owner, _, key = path.rpartition(".")
        setattr(net.get_submodule(owner), key, fresh)
    net.fc = torch.nn.Linear(256, 10)
    return net


def trained(name: str, *, epochs: int, rows: int, say: Any = print) -> Any:
    """The module in eval mode with trained weights, from the cache where they are there.

    Training that was broken off goes on after the last whole epoch.
    """
    from safetensors.torch import load_file, save_file

    net = module(name)
    path = cache() / f"fashion-{name}-{epochs}x{rows}.safetensors"
    if not path.exists():
        half_way = path.with_suffix(".half-way")
        say(f"{name}: training for {epochs} epochs on {rows} pictures (once; kept in {path})")
        _train(net, epochs=epochs, rows=rows, half_way=half_way, say=say)
        with _replacing(path) as draft:
            save_file({key: value.contiguous() for key, value in net.state_dict().items()}, draft)
        half_way.unlink(missing_ok=True)
    fresh = module(name)  # in plain memory layout, as a user's module is
    fresh.load_state_dict(load_file(path))
    return fresh.eval()


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A draft beside `path` that takes its place when the block ends well."""
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        yield draft
        draft.rename(path)
    finally:
        draft.unlink(missing_ok=True)


def _train(net: Any, *, epochs: int, rows: int, half_way: Path, say: Any) -> None:
    """SGD with one cycle of the learning rate, on mirrored and shifted pictures; state is kept after each epoch."""
    import torch

    pixels, labels = pictures("train")
    count = min(rows, 60000 - HELD_BACK)
    x, y = torch.from_numpy(pixels[:count]), torch.from_numpy(labels[:count])
    net.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.15, total_steps=-(-count // _BATCH) * epochs)
    parts = {"net": net, "optimizer": optimizer, "schedule": schedule}
    done = 0
    if half_way.exists():
        state = torch.load(half_way, weights_only=True)
        done = state.pop("epochs")
        for key, part in parts.items():
            part.load_state_dict(state[key])
    for epoch in range(done, epochs):
        torch.manual_seed(epoch)
        started = time.monotonic()
        loss = _epoch(net, x, y, optimizer=optimizer, schedule=schedule)
        say(f"  epoch {epoch + 1}: loss {loss:.3f}, {time.monotonic() - started:.0f} s")
        with _replacing(half_way) as draft:
            torch.save({"epochs": epoch + 1, **{key: part.state_dict() for key, part in parts.items()}}, draft)


def _epoch(net: Any, x: Any, y: Any, *, optimizer: Any, schedule: Any) -> float:
    """One pass over all pictures; the mean loss."""
    import torch

    from torchship.hardware import here

    # bf16 where the processor has tiles for it; its depthwise convolutions are slower backwards than those of fp32
    depthwise = any(getattr(part, "groups", 1) > 1 for part in net.modules())
    tiles = "amx_bf16" in here().features and not depthwise
    order, total = torch.randperm(len(x)), 0.0
    for start in range(0, len(x), _BATCH):
        rows = order[start : start + _BATCH]
        given = _varied(x[rows]).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=tiles):
            loss = torch.nn.functional.cross_entropy(net(given).float(), y[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        total += float(loss.detach()) * len(rows)
    return total / len(x)


def _varied(x: Any) -> Any:
    """Each picture mirrored with even odds, all shifted by up to two pixels."""
    import torch

    flip = torch.rand(len(x)) < 0.5
    x = torch.where(flip[:, None, None, None], x.flip(-1), x)
    across, down = (int(torch.randint(-2, 3, ())) for _ in range(2))
    return torch.roll(x, (down, across), (2, 3))
