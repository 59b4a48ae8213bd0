"""A gallery as one file (safetensors: plain data, nothing to run), and into another vector space."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load as load_tensors

from torchship.errors import BadInput, CorruptArtifact, Denied, NotFound, Unavailable
from torchship_faces.gallery import pictures
from torchship_faces.gallery.gallery import Enrolment, Gallery
from torchship_faces.gallery.state import Rows, State

_FORMAT = "torchship-gallery-1"
_BATCH = 256
_BLOCK = 16_384


class _Entry(msgspec.Struct, array_like=True):
    """One person in an export: how many templates, and everything else that is known."""

    person: str
    templates: int
    groups: tuple[str, ...] = ()
    about: dict[str, str] = {}
    qualities: tuple[float, ...] = ()


def export(gallery: Gallery, path: Path, *, faces: bool = False) -> int:
    """Write all people to `path`, with their kept faces where asked for; how many people. Atomic.

    Nothing but the names and numbers of the people is held in memory. Raises Unavailable where it cannot be written.
    """
    state = gallery.still()
    entries, parts = [], []
    for name, rows in state.everyone():
        person = state.about(name, rows)
        entries.append(_Entry(name, len(rows), person.groups, person.about, tuple(person.templates.values())))
        parts.append(rows)
    order = np.concatenate(parts) if parts else np.empty(0, np.int64)
    kept = [state.pictures.get(serial, b"") for serial in state.serial.take(order).tolist()] if faces else []
    sizes = np.array([pictures.size(gallery.root, digest) if digest else 0 for digest in kept], np.int64)
    people = msgspec.json.encode(entries)
    sections = {"vectors": ("F16", [len(order), gallery.width], len(order) * gallery.width * 2),
                "people": ("U8", [len(people)], len(people))}  # fmt: skip
    if faces:
        sections["face_sizes"] = ("I64", [len(sizes)], 8 * len(sizes))
        sections["faces"] = ("U8", [int(sizes.sum())], int(sizes.sum()))
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("wb") as file:
            file.write(_head(sections, {"format": _FORMAT, "model": gallery.model}))
            for start in range(0, len(order), _BLOCK):
                file.write(np.ascontiguousarray(state.vectors.take(order[start : start + _BLOCK]), "<f2").tobytes())
            file.write(people)
            file.write(sizes.astype("<i8").tobytes())
            for digest, size in zip(kept, sizes, strict=True):
                if size:
                    file.write(pictures.read(gallery.root, digest))
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except OSError as fault:
        raise Unavailable(f"{path} could not be written: {fault.strerror}", hint="the gallery is as it was") from None
    finally:
        with suppress(OSError):  # also a folder that is none
            temporary.unlink(missing_ok=True)
    return len(entries)


def _head(sections: Mapping[str, tuple[str, list[int], int]], metadata: dict[str, str]) -> bytes:
    """The head of a safetensors file: its length, then JSON that says where each tensor lies."""
    head: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, (dtype, shape, size) in sections.items():
        head[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = msgspec.json.encode(head)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def space_of(path: Path) -> tuple[str, int]:
    """The vector space of an export, and how long its vectors are. Raises NotFound, CorruptArtifact."""
    try:
        with safe_open(path, "np") as file:
            about, shape = file.metadata() or {}, file.get_slice("vectors").get_shape()
    except FileNotFoundError:
        raise NotFound(f"no file {path}") from None
    except (OSError, SafetensorError) as fault:
        raise CorruptArtifact(f"{path} is not an exported gallery: {fault}") from None
    if about.get("format") != _FORMAT or "model" not in about or len(shape) != 2:
        raise CorruptArtifact(f"{path} is not an exported gallery of format {_FORMAT}")
    return about["model"], shape[1]


def load(gallery: Gallery, path: Path) -> int:
    """Enrol everyone of an export; how many people. Templates of a person who is there already are replaced.

    Raises NotFound, CorruptArtifact for a file that is none of ours, Denied for vectors of another model.
    """
    space, _ = space_of(path)
    if space != gallery.model:
        raise Denied(
            f"{path} holds vectors of model {space}, the gallery those of {gallery.model}",
            hint="export with --faces, import into a gallery of its own, then re-embed",
        )
    try:
        tensors = load_tensors(path.read_bytes())
        entries = msgspec.json.decode(tensors["people"].tobytes(), type=list[_Entry])
        if sum(entry.templates for entry in entries) != len(tensors["vectors"]):
            raise CorruptArtifact(f"{path}: people and vectors are not as many")
    except (SafetensorError, msgspec.MsgspecError, KeyError) as fault:
        raise CorruptArtifact(f"{path} is not an exported gallery: {fault}") from None
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
    `embed` (JPEG to vector) raised BadInput for all of theirs. Who enrols meanwhile is not moved: stop the server.
    """
    old = Gallery(root, model=old_model, width=old_width, create=False)
    fresh = root.with_name(f".{root.name}.{secrets.token_hex(4)}")
    moved, lost = 0, []
    try:
        new = Gallery(fresh, model=model, width=width)
        state = old.still()
        for name, rows in state.everyone():
            item = _embedded(old.root, state, name, rows, embed)
            if item is None:
                lost.append(name)
                continue
            new.enrol([item])
            moved += 1
        new.compact()
        new.close()
        root.rename(_free(root.with_name(f"{root.name}.before-{model}")))
        fresh.rename(root)
    finally:
        old.close()
        shutil.rmtree(fresh, ignore_errors=True)
    return moved, lost


def _embedded(
    root: Path, state: State, name: str, rows: Rows, embed: Callable[[bytes], NDArray[np.float32]]
) -> Enrolment | None:
    """A person anew from the faces that were kept; None when there is none that can be embedded."""
    person = state.about(name, rows)
    vectors, faces, qualities = [], [], []
    for serial, quality in person.templates.items():
        if serial not in state.pictures:
            continue
        try:
            face = pictures.read(root, state.pictures[serial])
            vectors.append(embed(face))
        except (BadInput, NotFound):
            continue
        faces.append(face)
        qualities.append(quality)
    if not vectors:
        return None
    return Enrolment(
        person=name,
        vectors=np.stack(vectors),
        groups=person.groups,
        about=person.about,
        qualities=qualities,
        faces=faces,
    )


def _free(path: Path) -> Path:
    """`path`, or with a number behind it when it is taken."""
    number = 2
    found = path
    while found.exists():
        found = path.with_name(f"{path.name}-{number}")
        number += 1
    return found
