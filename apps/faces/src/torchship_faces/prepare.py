"""The face models as nn.Modules with their preprocessing inside: what goes in is bytes of pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

import torchship
from torchship.artifact import Artifact, Store, open_artifact
from torchship.errors import BadInput, NotFound
from torchship.stages.picture import picture_files, read_file
from torchship.tensors import Array, Tensors
from torchship_faces import Align, Find, Open, embedders, recipes, weights
from torchship_faces.dlib_resnet import DlibResnet
from torchship_faces.onnx_module import OnnxModule
from torchship_faces.stages import SIDE

_PORTABLE = ("onnxruntime", "openvino")  # they serve without torch, and their files are data
_VARIANTS = 12
Goal: TypeAlias = Literal["latency", "throughput", "size", "memory"]


class DetectorNet(nn.Module):
    """RetinaFace: canvas UINT8 [n, side, side, 3] RGB to loc [n, a, 4], face [n, a], landmarks [n, a, 10].

    `face` is a probability, the other two are relative to the anchors: `torchship_faces:Find` makes
    pixels of them.
    """

    mean: Tensor

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.net = OnnxModule(path)
        self.register_buffer("mean", torch.tensor([104.0, 117.0, 127.0]).view(1, 3, 1, 1))

    def forward(self, canvas: Tensor) -> dict[str, Tensor]:
        """Run on a batch of canvases."""
        x = canvas.permute(0, 3, 1, 2).float()
        loc, scores, landmarks = self.net(torch.cat([x[:, 2:3], x[:, 1:2], x[:, 0:1]], 1) - self.mean)
        return {"loc": loc, "face": scores[..., 1], "landmarks": landmarks}


class EmbedderNet(nn.Module):
    """Chips UINT8 [n, side, side, 3] RGB to unit vectors `embedding` [n, width], by whichever network is known."""

    def __init__(self, known: embedders.Embedder) -> None:
        super().__init__()
        path = weights.fetch(known.weights)
        self.net: nn.Module = DlibResnet(path) if known.name == "dlib" else FrFeature(path)

    def forward(self, chip: Tensor) -> dict[str, Tensor]:
        """Run on a batch of chips."""
        raw = self.net(chip.permute(0, 3, 1, 2).float())
        return {"embedding": torch.nn.functional.normalize(raw, dim=1)}


class FrFeature(nn.Module):
    """Chips FP32 [n, 3, 112, 112] RGB, 0 to 255, to vectors [n, 512]."""

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.net = OnnxModule(path)

    def forward(self, chip: Tensor) -> Tensor:
        """Run on a batch of chips."""
        x = (chip - 127.0) / 128.0
        raw: Tensor = self.net(torch.cat([x[:, 2:3], x[:, 1:2], x[:, 0:1]], 1))[0]
        return raw


def prepare(
    store: Store,
    *,
    model: embedders.Embedder | None = None,
    quick: bool = False,
    data: Path | None = None,
    budget: float = 240.0,
    goal: Goal = "latency",
    again: bool = False,
    tell: Callable[[str], None] = lambda _: None,
    on_trial: Any = None,
) -> list[Artifact]:
    """Fetch the weights, search the best way to run the detector and the embedder `model`, and publish both.

    `data` is a folder of pictures with faces to calibrate and judge on; else a few public ones are fetched. What the
    store holds already is left as it is, unless `again`. Where nothing that runs without torch is found within
    `budget` seconds, and without a search where it is to be `quick` (a minute), ONNX Runtime fp32 is built and checked
    against its module. Raises Unavailable, CorruptArtifact, BuildFailed, GuardRefused.
    """
    model = model or embedders.embedder()
    names = (recipes.DETECTOR, model.artifact)
    there = [] if again else [name for name in names if store.versions(name)]
    for name in there:
        tell(f"{name} is in the store already; --again makes it anew")
    missing = [name for name in names if name not in there]
    if missing:
        weights.fetch(model.weights, tell=tell)
        detector, embedding = DetectorNet(weights.fetch("retinaface", tell=tell)).eval(), EmbedderNet(model).eval()
        random = np.random.default_rng(0)
        canvases, chips = (random.integers(0, 256, (2, n, n, 3), dtype=np.uint8) for n in (SIDE, model.side))
        if not quick:
            canvases, chips = material(data or weights.pictures(tell=tell), detector, model=model)
    for name in missing:
        finds = name == recipes.DETECTOR
        module: nn.Module = detector if finds else embedding
        samples, key, most = (canvases, "canvas", 8) if finds else (chips, "chip", 16)
        first = (torch.from_numpy(samples[:2]),)
        if not quick:
            tell(f"optimizing {name}")
            batches = [{key: samples[at : at + 8]} for at in range(0, len(samples), 8)]
            effort = torchship.Effort(seconds=0.5, max_batch=most)
            how = {"calibration": batches, "effort": effort, "budget": budget, "goal": goal, "on_trial": on_trial}
            if _found(store, name, module, first, tell=tell, **how):
                continue
        tell(f"building {name}")
        recipe, guard = torchship.Recipe("onnxruntime", {"precision": "fp32"}), torchship.Guard(error=2e-3)
        torchship.build(module, first, recipe=recipe, name=name, store=store, guard=guard)
    return [open_artifact(store.resolve(name), verify=False) for name in names]


def _found(
    store: Store, name: str, module: nn.Module, inputs: tuple[Tensor, ...], *, tell: Callable[[str], None], **how: Any
) -> bool:
    """Whether a search found a way to run a model that needs no torch; it is published in `store` then."""
    with TemporaryDirectory(prefix="torchship-faces-") as scratch:
        guard = torchship.Guard(cosine=0.985, error=0.2)
        report = torchship.optimize(
            module, inputs, store=Store(scratch), name=name, guard=guard, backends=_PORTABLE, **how
        )
        if report.artifact is None or report.winner.recipe.backend not in _PORTABLE:
            tell(f"{name}: nothing that runs without torch was found in time, building ONNX Runtime fp32")
            return False
        store.publish(report.artifact.path, name=name)
    tell(f"{name}: {report.winner.recipe.label}, {report.speedup:.1f}x eager")
    return True


def material(folder: Path, detector: nn.Module, *, model: embedders.Embedder) -> tuple[Array, Array]:
    """Canvases, and chips for `model`, out of the pictures of a folder: each in several lights, sizes and mirrored.

    Raises NotFound when no picture in it shows a face.
    """
    opened, find, align = Open(), Find(), Align(side=model.side, template=model.template)
    random = np.random.default_rng(0)
    canvases, chips = [], []
    for path in picture_files(folder):
        try:
            first = opened(np.array([read_file(path)], np.object_))
        except BadInput:
            continue
        for variant in range(_VARIANTS):
            pixels, canvas, frame = first if not variant else _changed(opened, first[0][0], random)
            with torch.inference_mode():
                raw: Tensors = {name: tensor.numpy() for name, tensor in detector(torch.from_numpy(canvas)).items()}
            box, _, points = find(raw["loc"], raw["face"], raw["landmarks"], frame)
            if len(box):
                canvases.append(canvas)
                chips.append(align(pixels, frame, box, points)[0])
    if not canvases:
        raise NotFound(f"no picture in {folder} shows a face", hint="give a folder of JPEG or PNG files with faces")
    return np.concatenate(canvases)[::2][:40], np.concatenate(chips)[:160]


def _changed(opened: Open, pixels: Array, random: np.random.Generator) -> Sequence[Array]:
    """The picture in another light, size and shape, perhaps mirrored."""
    import io

    from PIL import Image, ImageEnhance

    picture = Image.fromarray(pixels[:, :: random.choice((-1, 1))])
    picture = ImageEnhance.Brightness(picture).enhance(float(random.uniform(0.6, 1.4)))
    picture = ImageEnhance.Contrast(picture).enhance(float(random.uniform(0.7, 1.3)))
    scale = random.uniform(0.4, 1.0) * np.array([1.0, random.uniform(0.9, 1.1)])
    picture = picture.resize(tuple(np.maximum(1, picture.size * scale).astype(int).tolist()))
    picture = picture.rotate(float(random.uniform(-15, 15)), Image.Resampling.BILINEAR)
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=int(random.integers(60, 95)))
    return opened(np.array([out.getvalue()], np.object_))
