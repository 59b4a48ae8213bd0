"""A gallery as one file (safetensors: plain data, nothing to run), and into another vector space."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from torchship.errors import BadInput, CorruptArtifact, Denied, NotFound
from torchship.stages.gallery.gallery import Enrolment, Gallery

_FORMAT = "torchship-gallery-1"
_BATCH = 256


class _Entry(msgspec.Struct, array_like=True):
    """One person in an export: how many templates, and everything else that is known."""

    person: str
    templates: int
    groups: tuple[str, ...] = ()
    about: dict[str, str] = {}
    qualities: tuple[float, ...] = ()


def export(gallery: Gallery, path: Path, *, faces: bool = False) -> int:
    """Write all people to `path`, with their kept faces where asked for; how many people. Atomic."""
    entries: list[_Entry] = []
    vectors: list[NDArray[np.float32]] = []
    kept: list[bytes] = []
    for name in _names(gallery):
        person = gallery.person(name)
        vectors.append(gallery.vectors_of(name))
        qualities = tuple(person.templates.values())
        entries.append(_Entry(name, len(vectors[-1]), person.groups, person.about, qualities))
        pictures = gallery.faces_of(name) if faces else {}
        kept += [pictures.get(serial, b"") for serial in person.templates]
    tensors: dict[str, NDArray[Any]] = {
        "vectors": np.concatenate(vectors) if vectors else np.empty((0, gallery.width), np.float32),
        "people": np.frombuffer(msgspec.json.encode(entries), np.uint8),
    }
    if faces:
        tensors["face_sizes"] = np.array([len(face) for face in kept], np.int64)
        tensors["faces"] = np.frombuffer(b"".join(kept), np.uint8)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with temporary.open("wb") as file:
        file.write(save_tensors(tensors, metadata={"format": _FORMAT, "model": gallery.model}))
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    return len(entries)


def _read(path: Path) -> tuple[str, dict[str, NDArray[Any]], list[_Entry]]:
    """The vector space, the tensors and the people of an export. Raises NotFound, CorruptArtifact."""
    try:
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        head = msgspec.json.decode(data[8 : 8 + length])["__metadata__"]
        tensors = load_tensors(data)
        entries = msgspec.json.decode(tensors["people"].tobytes(), type=list[_Entry])
        fits = head["format"] == _FORMAT and sum(entry.templates for entry in entries) == len(tensors["vectors"])
        space = str(head["model"])
    except FileNotFoundError:
        raise NotFound(f"no file {path}") from None
    except (SafetensorError, msgspec.MsgspecError, KeyError, TypeError) as fault:
        raise CorruptArtifact(f"{path} is not an exported gallery: {fault}") from None
    if not fits:
        raise CorruptArtifact(f"{path} is not an exported gallery of format {_FORMAT}")
    return space, tensors, entries


def space_of(path: Path) -> tuple[str, int]:
    """The vector space of an export, and how long its vectors are. Raises NotFound, CorruptArtifact."""
    space, tensors, _ = _read(path)
    return space, tensors["vectors"].shape[1]


def load(gallery: Gallery, path: Path) -> int:
    """Enrol everyone of an export; how many people. Templates of a person who is there already are replaced.

    Raises NotFound, CorruptArtifact for a file that is none of ours, Denied for vectors of another model.
    """
    space, tensors, entries = _read(path)
    if space != gallery.model:
        raise Denied(
            f"{path} holds vectors of model {space}, the gallery those of {gallery.model}",
            hint="export with --faces, import into a gallery of its own, then re-embed",
        )
    ends = np.cumsum([entry.templates for entry in entries])
    faces = _faces(tensors)
    batch: list[Enrolment] = []
    for entry, end in zip(entries, ends, strict=True):
        rows = slice(end - entry.templates, end)
        batch.append(
            Enrolment(
                person=entry.person,
                vectors=tensors["vectors"][rows],
                groups=entry.groups,
                about=entry.about,
                qualities=entry.qualities,
                faces=faces[rows],
                replace=True,
            )
        )
        if len(batch) == _BATCH:
            gallery.enrol(batch)
            batch = []
    if batch:
        gallery.enrol(batch)
    return len(entries)


def _faces(tensors: dict[str, NDArray[np.generic]]) -> list[bytes]:
    if "faces" not in tensors:
        return []
    data, ends = tensors["faces"].tobytes(), np.cumsum(tensors["face_sizes"])
    return [data[end - size : end] for end, size in zip(ends, tensors["face_sizes"], strict=True)]


def re_embed(
    root: Path, *, embed: Callable[[bytes], NDArray[np.float32]], model: str, width: int, old_model: str, old_width: int
) -> tuple[int, list[str]]:
    """Move the gallery in `root` to another model by embedding its kept faces anew.

    The new gallery is built beside the old one and takes its place when it is complete; the old one stays as
    `<root>.before-<model>`. How many people moved, and the names of those who could not: they keep no face, or
    `embed` (JPEG to vector) raised BadInput for all of theirs.
    """
    old = Gallery(root, model=old_model, width=old_width, create=False)
    fresh = root.with_name(f".{root.name}.{secrets.token_hex(4)}")
    new = Gallery(fresh, model=model, width=width)
    moved, lost = 0, []
    for name in _names(old):
        person, vectors, faces = old.person(name), [], []
        for face in old.faces_of(name).values():
            try:
                vectors.append(embed(face))
                faces.append(face)
            except BadInput:
                continue
        if not vectors:
            lost.append(name)
            continue
        item = Enrolment(person=name, vectors=np.stack(vectors), groups=person.groups, about=person.about, faces=faces)
        new.enrol([item])
        moved += 1
    new.compact()
    new.close()
    old.close()
    root.rename(root.with_name(f"{root.name}.before-{model}"))
    fresh.rename(root)
    return moved, lost


def _names(gallery: Gallery) -> list[str]:
    names: list[str] = []
    while page := gallery.page(after=names[-1] if names else "", limit=10_000):
        names += page
    return names
