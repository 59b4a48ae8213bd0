"""Sizes and speeds of the re-identification networks, fp32 and int8, on this CPU: `python -m examples.reid.sizes`.

The mission says 98 MB for the model and 25 MB for its int8: ResNet50 with 1,000 classes has 25.6 million weights, which
are 97.5 MiB as fp32 and 24.4 MiB as int8. The weights are random, so nothing is said of accuracy here: the guard only
checks how far int8 is from fp32 on the same random pictures.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import nn

import torchship
from examples.reid import model
from torchship.recipe import Recipe

MODELS = {"resnet50-ibn-a": (model.resnet50_ibn_a, 25.6), "osnet": (model.osnet, 2.2)}
RECIPES = (("onnxruntime", "fp32"), ("onnxruntime", "int8"), ("openvino", "int8"))


def pictures(rows: int) -> torch.Tensor:
    """Blurred noise in the size of both papers, 256x128."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(rows, 3, 32, 16, generator=generator)
    return nn.functional.interpolate(noise, size=(256, 128), mode="bicubic")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--budget", type=float, default=300.0, help="seconds for each search")
    words = parser.parse_args()
    for name in words.models:
        make, paper = MODELS[name]
        module = make()
        weights = sum(parameter.numel() for parameter in module.parameters())
        print(f"{name}: {weights:,} weights, the paper says {paper} M", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            measure(name, module, cache=Path(folder), budget=words.budget)


def measure(name: str, module: nn.Module, *, cache: Path, budget: float) -> None:
    """Search fp32 and int8 and print size and speed of each."""
    report = torchship.optimize(
        module,
        pictures(2),
        name=name,
        calibration=[pictures(96)],
        recipes=[Recipe(backend, {"precision": precision}) for backend, precision in RECIPES],
        publish=False,
        cache=cache,
        budget=budget,
    )
    for trial in report.trials:
        line = f"  {trial.recipe.label:34} {trial.status:9}"
        if trial.artifact:
            size = sum(path.stat().st_size for path in Path(trial.artifact).rglob("*") if path.is_file())
            line += f" {size / 2**20:6.1f} MiB"
        if trial.timing:
            line += f"  p50 {trial.timing.curve[0].p50_ms:6.1f} ms a picture"
        print(f"{line}  {trial.failure[:100]}", flush=True)


if __name__ == "__main__":
    main()
