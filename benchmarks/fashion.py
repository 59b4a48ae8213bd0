"""Fashion-MNIST from Debian's package, and the two classifiers that are trained on it once and then cached."""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import time
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
    """`resnet`: ResNet-18 at half width; `mobilenet_v3`: torchvision's large one; both for one channel of 28x28."""
    import torch
    import torchvision

    torch.manual_seed(0)
    if name == "mobilenet_v3":
        net = torchvision.models.mobilenet_v3_large(weights=None, num_classes=10)
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
    """The module in eval mode with trained weights, from the cache where they are there."""
    from safetensors.torch import load_file, save_file

    net = module(name)
    path = cache() / f"fashion-{name}-{epochs}x{rows}.safetensors"
    if path.exists():
        net.load_state_dict(load_file(path))
        return net.eval()
    say(f"{name}: training for {epochs} epochs on {rows} pictures (once; kept in {path})")
    _train(net, epochs=epochs, rows=rows, say=say)
    net.cpu()
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    save_file({key: value.contiguous() for key, value in net.state_dict().items()}, draft)
    draft.rename(path)
    return net.eval()


def _train(net: Any, *, epochs: int, rows: int, say: Any) -> None:
    """SGD with one cycle of the learning rate, mirrored and shifted pictures, bf16 where the processor has tiles."""
    import torch

    from torchship.hardware import here

    pixels, labels = pictures("train")
    x, y = (
        torch.from_numpy(pixels[: min(rows, 60000 - HELD_BACK)]),
        torch.from_numpy(labels[: min(rows, 60000 - HELD_BACK)]),
    )
    batch, steps = 128, -(-len(x) // 128) * epochs
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net.train().to(device, memory_format=torch.channels_last)
    x, y = x.to(device), y.to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.15, total_steps=steps)
    tiles = "amx_bf16" in here().features
    started = time.monotonic()
    for epoch in range(epochs):
        order, total = torch.randperm(len(x)).to(device), 0.0
        for start in range(0, len(x), batch):
            rows_now = order[start : start + batch]
            given = _varied(x[rows_now]).contiguous(memory_format=torch.channels_last)
            with torch.autocast(device, torch.bfloat16, enabled=tiles or device == "cuda"):
                loss = torch.nn.functional.cross_entropy(net(given).float(), y[rows_now], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(rows_now)
        say(f"  epoch {epoch + 1}: loss {total / len(x):.3f} after {time.monotonic() - started:.0f} s")


def _varied(x: Any) -> Any:
    """Each picture mirrored with even odds, all shifted by up to two pixels."""
    import torch

    flip = torch.rand(len(x), device=x.device) < 0.5
    x = torch.where(flip[:, None, None, None], x.flip(-1), x)
    across, down = (int(torch.randint(-2, 3, ())) for _ in range(2))
    return torch.roll(x, (down, across), (2, 3))
