"""From pictures to enrolments: one good face of a picture, or the reason why not; the pictures of a folder."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from torchship.errors import BadInput, NotFound
from torchship.stages.picture import PictureLimits, decode, picture_files, read_file
from torchship.tensors import Tensors
from torchship_faces.gallery.gallery import Enrolment, Gallery
from torchship_faces.quality import Gate, grade, refusal

_KEPT_SIDE = 320


@dataclass(frozen=True)
class Face:
    """A face that may be enrolled: `embedding` [width], `grade` from 0 to 1, `kept` a JPEG cut out of the picture."""

    embedding: NDArray[np.float32]
    grade: float
    kept: bytes


class RefusedFace(BadInput):
    """The picture is fine as a picture, but not for enrolment."""


def examine(found: Tensors, *, gate: Gate | None = None, picture: bytes = b"") -> Face:
    """The one face of a picture, from the outputs of the embed pipeline; `picture` is cut for keeping when given.

    A second face counts when it is at least half as large as the first. Raises RefusedFace with the reason.
    """
    sides = found["quality"][:, 0]
    if not len(sides):
        raise RefusedFace("there is no face in the picture", hint="use a picture that shows one face, upright")
    first = int(np.argmax(sides))
    rivals = int((sides >= sides[first] / 2).sum()) - 1
    if rivals:
        raise RefusedFace(
            f"there are {rivals + 1} faces in the picture", hint="cut the picture so that it shows one person"
        )
    quality, score = found["quality"][first], float(found["score"][first])
    reason = refusal(quality, score, gate=gate or Gate())
    if reason:
        raise RefusedFace(reason, hint="use a better picture, or lower the limit")
    kept = cut(picture, found["box"][first]) if picture else b""
    return Face(np.asarray(found["embedding"][first]), grade(quality, score), kept)


def largest(found: Tensors, *, what: str = "the picture") -> int:
    """The row of the largest face. Raises RefusedFace when there is none."""
    boxes = found["box"]
    if not len(boxes):
        raise RefusedFace(f"there is no face in {what}", hint="lower min_score, or use a picture that shows a face")
    return int(np.argmax((boxes[:, 2:] - boxes[:, :2]).prod(1)))


def cut(picture: bytes, box: NDArray[np.float32]) -> bytes:
    """A face with some of its surroundings as JPEG, at most 320 pixels a side: enough to embed it anew."""
    whole = decode(picture, limits=PictureLimits()).convert("RGB")
    margin = 0.5 * float(max(box[2] - box[0], box[3] - box[1]))
    left, top = max(0, int(box[0] - margin)), max(0, int(box[1] - margin))
    part = whole.crop((left, top, min(whole.width, int(box[2] + margin)), min(whole.height, int(box[3] + margin))))
    part.thumbnail((_KEPT_SIDE, _KEPT_SIDE), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    part.save(out, "JPEG", quality=95)
    return out.getvalue()


def pictures_of(folder: Path) -> Iterator[tuple[str, Path, bool]]:
    """Person, file, and whether the folder says so: `folder/person/*.jpg` does.

    In `folder/person.jpg` a number at the end does not count, and further down the topmost folder is the person: these
    are guesses. Raises NotFound for a folder without pictures.
    """
    path = None
    for path in picture_files(folder):
        inside = path.relative_to(folder).parts
        if len(inside) > 1:
            yield inside[0], path, len(inside) == 2
        else:
            name = path.stem.rstrip("0123456789").rstrip("_- ")
            yield name or path.stem, path, name == path.stem
    if path is None:
        raise NotFound(f"there are no pictures in {folder}", hint="one folder a person, or person.jpg, person2.jpg")


class Enrolled(msgspec.Struct, frozen=True):
    """What became of one picture of a folder: `refused` says why it was not enrolled, `note` what to look at."""

    person: str
    file: str
    quality: float = 0.0
    refused: str = ""
    note: str = ""


def enrol_folder(
    folder: Path,
    find: Callable[[bytes], Tensors],
    gallery: Gallery,
    *,
    threshold: float,
    groups: tuple[str, ...] = (),
    replace: bool = False,
    keep_faces: bool = True,
) -> Iterator[Enrolled]:
    """Enrol the pictures of a folder one by one; what cannot be read or enrolled is told, and the rest goes on.

    `find` gives the faces of a picture. A picture that differs from the others of its person (similarity below
    `threshold`) is told too, and not enrolled where it is by guess that they are one person.
    """
    fresh: set[str] = set()
    for person, path, sure in pictures_of(folder):
        anew = replace and person not in fresh
        try:
            picture = read_file(path)
            face = examine(find(picture), picture=picture if keep_faces else b"")
            near = 1.0 if anew else max(gallery.vectors_of(person) @ face.embedding, default=1.0)
            if near < threshold and not sure:
                raise RefusedFace(
                    f"it does not agree with the other pictures of {person!r} "
                    f"(similarity {near:.2f}, at least {threshold:g} is needed): give each person a folder"
                )
            item = Enrolment(
                person=person,
                vectors=face.embedding[None],
                groups=groups,
                qualities=(face.grade,),
                faces=(face.kept,) if face.kept else (),
                replace=anew,
            )
            gallery.enrol([item])
        except BadInput as fault:
            yield Enrolled(person, str(path), refused=str(fault))
            continue
        fresh.add(person)
        note = f"differs from the other pictures of this person (similarity {near:.2f})" if near < threshold else ""
        yield Enrolled(person, str(path), quality=round(face.grade, 3), note=note)
