"""The gallery as stages: match rows of embeddings, enrol and forget people, merge the answers of shards."""

from __future__ import annotations

from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from torchship.errors import BadConfig, BadInput
from torchship.stage import stage
from torchship.tensors import Array
from torchship_faces.gallery.gallery import Enrolment, Gallery

Threshold = Annotated[float, Meta(ge=-1.0, le=1.0, description="least cosine similarity to be called this person")]
_ROWS = "person:BYTES[-1], known:BOOL[-1], similarity:FP32[-1], nearest:BYTES[-1]"


def _declare(width: int) -> str:
    return f"embedding:FP32[-1,{width}] -> {_ROWS}"


@stage(_declare(512), batched=True, max_batch=64)
class Match:
    """Who each embedding is: `person` (empty when unknown), `known`, `similarity` of the nearest person.

    `nearest` holds the `top` nearest persons of each row as JSON, below the threshold too.
    """

    def __init__(self, *, gallery: str, model: str, width: int = 512, exact_below: int = 20_000, threads: int = 2):
        self._gallery = Gallery(gallery, model=model, width=width, exact_below=exact_below, threads=threads)

    @classmethod
    def declare(cls, *, width: int = 512, **_: object) -> str:
        """The signature for these options."""
        return _declare(width)

    def __call__(
        self,
        embedding: Array,
        *,
        threshold: Threshold = 0.45,
        group: Annotated[str, Meta(description="only persons of this group; empty is everyone")] = "",
        top: Annotated[int, Meta(ge=1, le=100, description="how many of the nearest persons to list")] = 1,
        effort: Annotated[int, Meta(ge=16, le=100_000, description="length of the re-ranked short list")] = 256,
        exact: Annotated[bool, Meta(description="compare every template instead of a short list")] = False,
    ) -> tuple[Array, ...]:
        found = self._gallery.nearest(embedding, count=top, group=group, effort=effort, exact=exact)
        person = np.array([line[0].person.encode() if line else b"" for line in found], np.object_)
        similarity = np.array([line[0].score if line else -1.0 for line in found], np.float32)
        nearest = np.empty(len(found), np.object_)
        for row, line in enumerate(found):
            nearest[row] = msgspec.json.encode([{"person": m.person, "similarity": m.score} for m in line])
        return _decide(person, similarity, nearest, threshold)

    def close(self) -> None:
        """Close the gallery."""
        self._gallery.close()


def _decide(person: Array, similarity: Array, nearest: Array, threshold: float) -> tuple[Array, ...]:
    known = (similarity >= threshold) & (person != b"")
    return np.where(known, person, b"").astype(np.object_), known.astype(np.bool_), similarity, nearest


@stage(f"similarity_0:FP32[-1], nearest_0:BYTES[-1] -> {_ROWS}", batched=True, max_batch=1024)
class Merge:
    """The answers of several galleries (shards) as one: the nearest person of all, judged by `threshold`.

    The shards are asked for everything (`threshold = -1`); their outputs are renamed
    `similarity_0`, `nearest_0`, `similarity_1` and so on.
    """

    def __init__(self, *, shards: int):
        self._shards = shards

    @classmethod
    def declare(cls, *, shards: int) -> str:
        """The signature for so many shards."""
        if shards < 1:
            raise BadConfig(f"shards is {shards}, expected 1 or more")
        names = ", ".join(f"similarity_{n}:FP32[-1], nearest_{n}:BYTES[-1]" for n in range(shards))
        return f"{names} -> {_ROWS}"

    def __call__(
        self,
        *parts: Array,
        threshold: Threshold = 0.45,
        top: Annotated[int, Meta(ge=1, le=100, description="how many of the nearest persons to list")] = 1,
    ) -> tuple[Array, ...]:
        lists = parts[1::2]
        rows = len(parts[0])
        person, nearest = np.empty(rows, np.object_), np.empty(rows, np.object_)
        similarity = np.full(rows, -1.0, np.float32)
        for row in range(rows):
            found = [entry for part in lists for entry in msgspec.json.decode(part[row])]
            found.sort(key=lambda entry: -entry["similarity"])
            person[row] = found[0]["person"].encode() if found else b""
            similarity[row] = found[0]["similarity"] if found else -1.0
            nearest[row] = msgspec.json.encode(found[:top])
        return _decide(person, similarity, nearest, threshold)


@stage("person:BYTES[1], embedding:FP32[1..64,512] -> templates:INT64[1]")
class Enrol:
    """Add embeddings to a person; the answer comes when they are on disk. `templates` counts what the person has."""

    def __init__(self, *, gallery: str, model: str, width: int = 512):
        self._gallery = Gallery(gallery, model=model, width=width)

    @classmethod
    def declare(cls, *, width: int = 512, **_: object) -> str:
        """The signature for these options."""
        return f"person:BYTES[1], embedding:FP32[1..64,{width}] -> templates:INT64[1]"

    def __call__(
        self,
        person: Array,
        embedding: Array,
        *,
        groups: Annotated[str, Meta(description="names of groups, split by commas")] = "",
        replace: Annotated[bool, Meta(description="drop what the person had before")] = False,
    ) -> Array:
        name = _text(person)
        chosen = tuple(part.strip() for part in groups.split(",") if part.strip())
        self._gallery.enrol([Enrolment(person=name, vectors=embedding, groups=chosen, replace=replace)])
        return np.array([len(self._gallery.person(name).templates)], np.int64)

    def close(self) -> None:
        """Close the gallery."""
        self._gallery.close()


@stage("person:BYTES[1] -> templates:INT64[1]")
class Forget:
    """Drop a person; `templates` counts what was dropped. Raises NotFound."""

    def __init__(self, *, gallery: str, model: str, width: int = 512):
        self._gallery = Gallery(gallery, model=model, width=width)

    def __call__(
        self,
        person: Array,
        *,
        compact: Annotated[bool, Meta(description="remove the vectors from the disk at once")] = False,
    ) -> Array:
        return np.array([self._gallery.forget(_text(person), compact=compact)], np.int64)

    def close(self) -> None:
        """Close the gallery."""
        self._gallery.close()


def _text(array: Array) -> str:
    try:
        return bytes(array[0]).decode()
    except UnicodeDecodeError:
        raise BadInput("the name of the person is not UTF-8") from None
