"""Face recognition in this process, for the command line: pictures in, faces out, drawn where asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from torchship.artifact import Store
from torchship.errors import BadInput, NotFound
from torchship.pipeline import Composed, convert, plan
from torchship.stages.picture import PictureLimits, decode
from torchship.tensors import Tensors
from torchship_faces import recipes
from torchship_faces.embedders import DEFAULT, Embedder, embedder
from torchship_faces.gallery import snapshot
from torchship_faces.gallery.gallery import Gallery

_KNOWN, _UNKNOWN, _POINT = (46, 160, 67), (207, 34, 46), (255, 212, 0)


class Recognizer:
    """The embed pipeline with `model`, opened."""

    def __init__(self, store: str = "", *, model: Embedder | None = None) -> None:
        """Raises NotFound with the way to make the models."""
        place, self.model = Store(store or None), model or embedder()
        try:
            checked = plan(convert(recipes.embed(model=self.model)), place)
        except NotFound as fault:
            words = "" if self.model.name == DEFAULT else f" --embedder {self.model.name}"
            raise NotFound(str(fault), hint=f"make the face models first: torchship faces prepare{words}") from None
        self._pipeline = Composed(checked, place)

    def __call__(self, picture: bytes, *, what: object = "", **parameters: Any) -> Tensors:
        """`box`, `score`, `points`, `quality`, `embedding` of all faces. Raises BadInput, which begins with `what`."""
        try:
            return self._pipeline({"image": np.array([picture], np.object_)}, parameters)
        except BadInput as fault:
            raise BadInput(f"{what}: {fault}" if what else str(fault), hint=fault.hint) from None

    def close(self) -> None:
        """Close the models."""
        self._pipeline.close()


def open_gallery(folder: str, *, model: Embedder | None = None) -> Gallery:
    """The gallery of a folder, made for `model` when there is none; without a model it must be there, whatever vectors
    it holds. Raises NotFound, Denied."""
    if model is not None:
        return Gallery(Path(folder), model=model.space, width=model.width)
    manifest = snapshot.read_manifest(Path(folder))
    return Gallery(Path(folder), model=manifest.model, width=manifest.width, create=False)


def read(path: Path) -> bytes:
    """The bytes of a file. Raises NotFound, BadInput."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise NotFound(f"no file {path}") from None
    except OSError as fault:
        raise BadInput(f"{path}: {fault.strerror}") from None


@contextmanager
def written(path: Path) -> Iterator[None]:
    """What is written to `path` inside; raises BadInput where that cannot be."""
    try:
        yield
    except (OSError, ValueError) as fault:  # a full disk; an ending that Pillow does not know
        raise BadInput(f"{path} cannot be written: {getattr(fault, 'strerror', None) or fault}") from None


def draw(picture: bytes, found: Tensors, *, names: Sequence[str] = ()) -> Image.Image:
    """The picture with boxes, points, and the name of each face (empty: unknown)."""
    image = decode(picture, limits=PictureLimits()).convert("RGB")
    pen = ImageDraw.Draw(image)
    width = max(2, min(image.size) // 250)
    for row, (box, points) in enumerate(zip(found["box"], found["points"], strict=True)):
        name = names[row] if row < len(names) else ""
        colour = _KNOWN if name else _UNKNOWN
        pen.rectangle([float(value) for value in box], outline=colour, width=width)
        for x, y in points:
            pen.ellipse((x - width, y - width, x + width, y + width), fill=_POINT)
        size = 10 * width
        place = (float(box[0]), max(0.0, float(box[1]) - size - width))
        around = pen.textbbox(place, name or "unknown", font_size=size)
        pen.rectangle((around[0] - width, around[1] - width, around[2] + width, around[3] + width), fill=colour)
        pen.text(place, name or "unknown", fill=(255, 255, 255), font_size=size)
    return image
