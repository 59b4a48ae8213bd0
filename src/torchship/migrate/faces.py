"""The face models as nn.Modules with their preprocessing inside: what goes in is bytes of pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from torchship.errors import BadInput, GuardRefused, NotFound, NoWinner
from torchship.migrate.dlib_resnet import DlibResnet
from torchship.migrate.onnx_module import OnnxModule
from torchship.recipe import Recipe
from torchship.stages.faces import Align, Find, Open, embedders, recipes, weights
from torchship.tensors import Array, Tensors

if TYPE_CHECKING:
    from torchship.artifact import Artifact, Store
    from torchship.model import Model
    from torchship.optimize.choose import Goal
    from torchship.optimize.report import Report

_PORTABLE = ("onnxruntime", "openvino")  # they serve without torch, and their files are data
_VARIANTS = 12


class Detector(nn.Module):
    """RetinaFace: canvas UINT8 [n, side, side, 3] RGB to loc [n, a, 4], face [n, a], landmarks [n, a, 10].

    `face` is a probability, the other two are relative to the anchors: `torchship.stages.faces:Find` makes
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


class Embedder(nn.Module):
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
    data: Path | None = None,
    budget: float = 240.0,
    goal: Goal = "latency",
    tell: Callable[[str], None] = lambda _: None,
    on_trial: Any = None,
) -> list[Report]:
    """Fetch the weights, search the best way to run the detector and the embedder `model`, and publish both.

    `data` is a folder of pictures with faces to calibrate and judge on; else a few public ones are fetched.
    Raises Unavailable, CorruptArtifact, NoWinner.
    """
    from torchship.optimize.guard import Guard
    from torchship.optimize.measure import Effort
    from torchship.optimize.search import optimize

    model = model or embedders.embedder()
    detector, embedding = _modules(model, tell)
    canvases, chips = material(data or weights.pictures(tell=tell), detector, model=model)
    reports = []
    for name, module, samples in ((recipes.DETECTOR, detector, canvases), (model.artifact, embedding, chips)):
        tell(f"optimizing {name}")
        key = "canvas" if name == recipes.DETECTOR else "chip"
        report = optimize(
            module,
            (torch.from_numpy(samples[:2]),),
            calibration=[{key: samples[at : at + 8]} for at in range(0, len(samples), 8)],
            guard=Guard(cosine=0.985, error=0.2),
            backends=_PORTABLE,
            effort=Effort(seconds=0.5, max_batch=8 if key == "canvas" else 16),
            budget=budget,
            goal=goal,
            store=store,
            name=name,
            on_trial=on_trial,
        )
        if report.winner is None:
            raise NoWinner(f"{name}: {report.facts.choice.reason}", hint="give more --budget, or --quick")
        reports.append(report)
    return reports


def build(
    store: Store, *, model: embedders.Embedder | None = None, tell: Callable[[str], None] = lambda _: None
) -> list[Artifact]:
    """Publish both models as ONNX Runtime fp32 without a search, each checked against its module. Takes a minute.

    Raises Unavailable, CorruptArtifact, BuildFailed, GuardRefused.
    """
    from torchship.optimize.capture import capture

    tell("building the face models")
    model = model or embedders.embedder()
    detector, embedding = _modules(model, tell)
    built = []
    for name, module, shape in (
        (recipes.DETECTOR, detector, (2, 640, 640, 3)),
        (model.artifact, embedding, (2, model.side, model.side, 3)),
    ):
        noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
        built.append(_build(capture(module, (noise,), name=name), store))
    return built


def _modules(model: embedders.Embedder, tell: Callable[[str], None]) -> tuple[Detector, Embedder]:
    """The detector, and the embedder `model`."""
    weights.fetch(model.weights, tell=tell)
    return Detector(weights.fetch("retinaface", tell=tell)).eval(), Embedder(model).eval()


def _build(model: Model, store: Store) -> Artifact:
    """One artifact: built, packed, opened from disk, compared, published."""
    from datetime import UTC, datetime
    from tempfile import TemporaryDirectory

    from torchship import __version__
    from torchship.artifact import open_artifact, package
    from torchship.artifact.manifest import Provenance
    from torchship.backends import onnxruntime
    from torchship.optimize.cache import hash_model
    from torchship.optimize.reference import EagerStage

    example = model.examples[0]
    wanted = EagerStage(model)(example)
    recipe = Recipe("onnxruntime", {"precision": "fp32"})
    with TemporaryDirectory(prefix="torchship-faces-") as scratch:
        folder = Path(scratch) / "artifact"
        (folder / "backend").mkdir(parents=True)
        onnxruntime.build(model, options=dict(recipe.options), out=folder / "backend")
        created = datetime.now(UTC).isoformat(timespec="seconds")
        origin = Provenance(__version__, created, f"torchship.migrate.faces:{model.name}", hash_model(model))
        package.pack(
            folder,
            name=model.name,
            signature=model.signature,
            recipe=recipe,
            provenance=origin,
            max_batch=16,
            inputs=example,
            outputs=wanted,
        )
        stage = open_artifact(folder).open()
        for key, value in stage(example).items():
            error = float(np.linalg.norm(value - wanted[key]) / max(float(np.linalg.norm(wanted[key])), 1e-9))
            if error > 2e-3:
                raise GuardRefused(f"{model.name}: output {key!r} is {error:.1%} off", hint="report this")
        stage.close()
        number = store.publish(folder, name=model.name)
    return open_artifact(store.resolve(f"{model.name}@{number}"), verify=False)


def material(folder: Path, detector: nn.Module, *, model: embedders.Embedder) -> tuple[Array, Array]:
    """Canvases, and chips for `model`, out of the pictures of a folder: each in several lights, sizes and mirrored.

    Raises NotFound when no picture in it shows a face.
    """
    opened, find, align = Open(), Find(), Align(side=model.side, template=model.template)
    random = np.random.default_rng(0)
    canvases, chips = [], []
    for data in _pictures(folder):
        try:
            first = opened(np.array([data], np.object_))
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


def _pictures(folder: Path) -> Iterator[bytes]:
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"):
            yield path.read_bytes()


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
