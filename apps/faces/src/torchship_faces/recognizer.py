"""Face recognition in this process, for the command line: pictures in, faces out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from torchship.artifact import Store
from torchship.errors import BadInput, NotFound
from torchship.pipeline import Composed, convert, plan
from torchship.tensors import Tensors
from torchship_faces import recipes
from torchship_faces.embedders import DEFAULT, Embedder, embedder
from torchship_faces.gallery import snapshot
from torchship_faces.gallery.gallery import Gallery

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")


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


def pictures_of(folder: Path) -> Iterator[tuple[str, Path]]:
    """Person and file: `folder/person/*.jpg`, or `folder/person.jpg` (a number at its end does not count).

    Raises NotFound for a folder without pictures.
    """
    found = False
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES:
            found = True
            inside = path.relative_to(folder).parts
            yield inside[0] if len(inside) > 1 else path.stem.rstrip("0123456789").rstrip("_- ") or path.stem, path
    if not found:
        raise NotFound(f"there are no pictures in {folder}", hint="one folder a person, or person.jpg, person2.jpg")


def read(path: Path) -> bytes:
    """The bytes of a file. Raises NotFound, BadInput."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise NotFound(f"no file {path}") from None
    except OSError as fault:
        raise BadInput(f"{path}: {fault.strerror}") from None
