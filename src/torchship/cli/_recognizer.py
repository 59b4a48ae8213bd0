"""Face recognition in this process, for the command line: pictures in, faces out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from torchship.artifact import Store
from torchship.errors import BadInput, NotFound
from torchship.pipeline import Composed, plan
from torchship.pipeline.config import convert
from torchship.stages.faces import recipes
from torchship.stages.faces.embedders import embedder
from torchship.stages.gallery.gallery import Gallery
from torchship.tensors import Tensors

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")


class Recognizer:
    """The embed pipeline, opened."""

    def __init__(self, store: str = "") -> None:
        """Raises NotFound with the way to make the models."""
        place = Store(store or None)
        try:
            checked = plan(convert(recipes.embed()), place)
        except NotFound as fault:
            raise NotFound(str(fault), hint="make the face models first: torchship faces prepare") from None
        self._pipeline = Composed(checked, place)

    def __call__(self, picture: bytes, **parameters: Any) -> Tensors:
        """`box`, `score`, `points`, `quality`, `embedding` of all faces. Raises BadInput."""
        return self._pipeline({"image": np.array([picture], np.object_)}, parameters)

    def close(self) -> None:
        """Close the models."""
        self._pipeline.close()


def open_gallery(folder: str, *, create: bool = False) -> Gallery:
    """The gallery of a folder for the default embedder. Raises NotFound, Denied."""
    model = embedder()
    return Gallery(Path(folder), model=model.space, width=model.width, create=create)


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
