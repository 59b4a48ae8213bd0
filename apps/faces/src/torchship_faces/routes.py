"""The faces API: detect, embed, verify and identify faces, and the people of the gallery, as plain REST.

It is mounted beside the Open Inference Protocol by `[[mount]] run = "torchship_faces.routes:mount"`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from torchship.errors import BadInput, TorchshipError
from torchship.serve.routes import Exchange, Route, Service, query_parameters, query_words
from torchship.stage import Parameter, Value
from torchship.tensors import Tensors
from torchship_faces import enrolment, recipes
from torchship_faces.embedders import Embedder, embedder
from torchship_faces.gallery import names
from torchship_faces.gallery.gallery import Enrolment, Gallery
from torchship_faces.quality import Gate
from torchship_faces.uploads import Upload, group_names, read_upload

_MOST_PICTURES = 32
_THRESHOLD = Parameter("threshold", 0.0, -1.0, 1.0, "least cosine similarity to be one person")


def configuration(
    *,
    gallery: str,
    store: str = "",
    http_host: str = "127.0.0.1",
    http_port: int = 8000,
    copies: int = 1,
    model: str = "",
) -> dict[str, Any]:
    """A whole server for faces, as plain data: the same that a TOML file holds.

    `model` names the embedder; without it the gallery's own, or the default for a new one.

    One pipeline answers every request: its stages are processes, and three pipelines would hold each model three times.
    """
    chosen = embedder(model, gallery=gallery)
    options = {"gallery": gallery, "model": chosen.name}
    return {
        "http": {"host": http_host, "port": http_port},
        "store": {"root": store},
        "model": [recipes.identify(gallery, model=chosen, copies=copies)],
        "mount": [{"run": "torchship_faces.routes:mount", "options": options}],
    }


def mount(
    service: Service,
    *,
    gallery: str,
    detect: str = "faces",
    embed: str = "faces",
    identify: str = "faces",
    model: str = "",
    keep_faces: bool = True,
    gate: dict[str, float] = {},
) -> list[Route]:
    """The routes. `detect`, `embed` and `identify` name the served pipelines, `gate` limits enrolment,
    `keep_faces` keeps a cut-out of every enrolled face, so that the gallery can move to another embedder.
    `model` names the embedder of the pipelines; without it the gallery's own, or the default for a new one."""
    chosen = embedder(model, gallery=gallery)
    book = Gallery(gallery, model=chosen.space, width=chosen.width)
    pictures = _Pictures(service, chosen, detect=detect, embed=embed, identify=identify)
    people = _People(pictures, book, keep_faces=keep_faces, gate=msgspec.convert(gate, Gate))
    return [
        Route("POST", "/v1/faces/detect", pictures.detect, "infer"),
        Route("POST", "/v1/faces/embed", pictures.embed, "infer"),
        Route("POST", "/v1/faces/verify", pictures.verify, "infer"),
        Route("POST", "/v1/faces/identify", pictures.identify, "infer"),
        Route("GET", "/v1/people", people.page, "infer"),
        Route("GET", "/v1/people/{person:text}", people.show, "infer"),
        Route("PUT", "/v1/people/{person:text}", people.put, "manage"),
        Route("POST", "/v1/people/{person:text}", people.add, "manage"),
        Route("DELETE", "/v1/people/{person:text}", people.forget, "manage"),
        Route("DELETE", "/v1/people/{person:text}/templates/{template}", people.forget, "manage"),
        Route("GET", "/v1/gallery", people.count, "infer"),
        Route("POST", "/v1/gallery/compact", people.compact, "manage"),
    ]


class _Pictures:
    """What is done with pictures, by way of the served pipelines."""

    def __init__(self, service: Service, model: Embedder, *, detect: str, embed: str, identify: str) -> None:
        self._service, self._model = service, model
        self._detect, self.embed_model, self._identify = detect, embed, identify

    async def detect(self, exchange: Exchange) -> None:
        """One picture: its faces."""
        picture, values = self._one(exchange, self._detect)
        found = await self.run(self._detect, picture, values, recipes.DETECT_OUTPUTS)
        exchange.answer_json({"faces": _faces(found)})

    async def embed(self, exchange: Exchange) -> None:
        """One picture: its faces with their vectors."""
        found = await self.embedded(*self._one(exchange, self.embed_model))
        faces = _faces(found)
        for face, vector in zip(faces, found["embedding"], strict=True):
            face["embedding"] = [round(float(value), 6) for value in vector]
        exchange.answer_json({"faces": faces, "model": self._model.space})

    async def verify(self, exchange: Exchange) -> None:
        """Two pictures: whether their largest faces are one person's."""
        upload = read_upload(exchange)
        pair = [picture for picture in (upload.first, upload.second, *upload.images) if picture]
        if len(pair) != 2:
            raise BadInput(f"verify takes two pictures, here are {len(pair)}", hint="name them first and second")
        values = self.values(exchange, upload, self.embed_model, also=("threshold",))
        threshold = float(_THRESHOLD.check(values.pop("threshold", self._model.threshold)))
        both = await asyncio.gather(*(self.embedded(picture, values) for picture in pair))
        rows = [enrolment.largest(found, what=what) for found, what in zip(both, ("first", "second"), strict=True)]
        first, second = (found["embedding"][row] for found, row in zip(both, rows, strict=True))
        similarity = float(first @ second)
        faces = [_faces(found)[row] for found, row in zip(both, rows, strict=True)]
        same = similarity >= threshold
        exchange.answer_json({"same": same, "similarity": similarity, "threshold": threshold, "faces": faces})

    async def identify(self, exchange: Exchange) -> None:
        """One picture: its faces, and the person of the gallery that each is, if any."""
        found = await self.run(self._identify, *self._one(exchange, self._identify))
        faces = _faces(found)
        for row, face in enumerate(faces):
            known = bool(found["known"][row])
            face["person"] = found["person"][row].decode() if known else None
            face["unknown"] = not known
            face["similarity"] = round(float(found["similarity"][row]), 4)
            face["nearest"] = msgspec.json.decode(found["nearest"][row])
        exchange.answer_json({"faces": faces})

    def _one(self, exchange: Exchange, model: str) -> tuple[bytes, dict[str, Value]]:
        """The one picture of a request, and its parameters."""
        upload = read_upload(exchange)
        if len(upload.images) != 1:
            raise BadInput(f"here are {len(upload.images)} pictures, expected one", hint="one request a picture")
        return upload.images[0], self.values(exchange, upload, model)

    def values(self, exchange: Exchange, upload: Upload, model: str, *, also: Sequence[str] = ()) -> dict[str, Value]:
        """The parameters in the query and in a JSON body. Raises BadInput for one that the pipeline does not have."""
        words = query_words(exchange.head)
        texts: dict[str, Value] = {
            name: words[name] for name in ("group", "groups") if name in words
        }  # also where it is 2024
        found: dict[str, Value] = {**upload.parameters, **query_parameters(exchange.head), **texts}
        known = dict.fromkeys([*self._service.model_metadata(model)["parameters"], *also])
        unknown = sorted(found.keys() - known.keys())
        if unknown:
            raise BadInput(f"there is no parameter {unknown[0]!r}", hint=f"there is {', '.join(known)}")
        return found

    async def embedded(self, picture: bytes, values: dict[str, Value]) -> Tensors:
        """The faces of a picture with quality and embedding."""
        return await self.run(self.embed_model, picture, values, recipes.FACE_OUTPUTS)

    async def run(
        self, model: str, picture: bytes, values: dict[str, Value], outputs: Sequence[str] = recipes.MATCH_OUTPUTS
    ) -> Tensors:
        """One picture through one of the pipelines."""
        inputs = {"image": np.array([picture], np.object_)}
        return await self._service.infer(model, inputs, parameters=values, outputs=outputs)


class _People:
    """The people of the gallery. What waits for the disk runs in a thread."""

    def __init__(self, pictures: _Pictures, book: Gallery, *, keep_faces: bool, gate: Gate) -> None:
        self._pictures, self._book, self._keep, self._gate = pictures, book, keep_faces, gate

    async def put(self, exchange: Exchange) -> None:
        """Make a person of one or more pictures; what was there before is dropped."""
        await self._enrol(exchange, replace=True)

    async def add(self, exchange: Exchange) -> None:
        """Add pictures to a person."""
        await self._enrol(exchange, replace=False)

    async def _enrol(self, exchange: Exchange, *, replace: bool) -> None:
        person = names.checked_person(exchange.head.places["person"])
        upload = read_upload(exchange)
        pictures = upload.images + [picture for picture in (upload.first, upload.second) if picture]
        if not 1 <= len(pictures) <= _MOST_PICTURES:
            raise BadInput(f"here are {len(pictures)} pictures, expected 1 to {_MOST_PICTURES}")
        values = self._pictures.values(exchange, upload, self._pictures.embed_model, also=("groups",))
        groups = group_names(str(values.pop("groups", "")))
        examined = await asyncio.gather(*(self._examine(picture, values) for picture in pictures))
        faces = [face for face in examined if isinstance(face, enrolment.Face)]
        refused = [
            {"picture": number, "reason": str(face)}
            for number, face in enumerate(examined)
            if isinstance(face, TorchshipError)
        ]
        if not faces:
            reasons = "; ".join(f"picture {entry['picture']}: {entry['reason']}" for entry in refused)
            raise BadInput(f"no picture can be enrolled: {reasons}")
        item = Enrolment(
            person=person,
            vectors=np.stack([face.embedding for face in faces]),
            groups=(*upload.groups, *groups),
            about=upload.about,
            qualities=[face.grade for face in faces],
            faces=[face.kept for face in faces],
            replace=replace,
        )
        (serials,) = await asyncio.to_thread(self._book.enrol, [item])
        new = [
            {"template": serial, "quality": round(face.grade, 3)} for serial, face in zip(serials, faces, strict=True)
        ]
        exchange.answer_json({"person": person, "enrolled": new, "refused": refused}, status=201)

    async def _examine(self, picture: bytes, values: dict[str, Value]) -> enrolment.Face | BadInput:
        try:
            found = await self._pictures.embedded(picture, values)
            return await asyncio.to_thread(
                enrolment.examine, found, gate=self._gate, picture=picture if self._keep else b""
            )
        except BadInput as fault:
            return fault

    async def show(self, exchange: Exchange) -> None:
        """One person."""
        person = await asyncio.to_thread(self._book.person, exchange.head.places["person"])
        templates = [{"template": serial, "quality": round(grade, 3)} for serial, grade in person.templates.items()]
        exchange.answer_json(
            {"person": person.person, "groups": person.groups, "about": person.about, "templates": templates}
        )

    async def page(self, exchange: Exchange) -> None:
        """Some of the people: `?limit=100&after=NAME&group=NAME`."""
        query = query_words(exchange.head)
        limit = query.get("limit", "100")
        if not (limit.isascii() and limit.isdigit() and len(limit) <= 4 and 1 <= int(limit) <= 1000):
            raise BadInput(f"limit is {limit[:20]!r}, expected 1 to 1000")
        found = await asyncio.to_thread(
            self._book.page, after=query.get("after", ""), limit=int(limit), group=query.get("group", "")
        )
        people, templates = self._book.count()
        following = found[-1] if len(found) == int(limit) else None
        exchange.answer_json({"people": found, "next": following, "count": people, "templates": templates})

    async def forget(self, exchange: Exchange) -> None:
        """Drop a person or one template; `?compact=true` also removes the vectors from the disk at once."""
        places = exchange.head.places
        serial = places.get("template")
        if serial is not None and not (serial.isascii() and serial.isdigit()):
            raise BadInput(f"{serial[:40]!r} is not the number of a template")
        compact = query_words(exchange.head).get("compact", "false")
        if compact not in ("true", "false", "1", "0"):
            raise BadInput(f"compact is {compact[:20]!r}, expected true or false")
        number = None if serial is None else int(serial)
        gone = await asyncio.to_thread(
            self._book.forget, places["person"], serial=number, compact=compact in ("true", "1")
        )
        exchange.answer_json({"person": places["person"], "forgotten": gone})

    async def count(self, exchange: Exchange) -> None:
        """How many people, and in which vector space."""
        people, templates = await asyncio.to_thread(self._book.count)
        exchange.answer_json(
            {"people": people, "templates": templates, "model": self._book.model, "width": self._book.width}
        )

    async def compact(self, exchange: Exchange) -> None:
        """Remove what was forgotten from the disk."""
        await asyncio.to_thread(self._book.compact)
        await self.count(exchange)


def _faces(found: Tensors) -> list[dict[str, Any]]:
    faces: list[dict[str, Any]] = [
        {
            "box": [round(float(value), 1) for value in box],
            "score": round(float(score), 4),
            "points": [[round(float(x), 1), round(float(y), 1)] for x, y in points],
        }
        for box, score, points in zip(found["box"], found["score"], found["points"], strict=True)
    ]
    if "quality" in found:
        for face, (side, sharpness, yaw, pitch) in zip(faces, found["quality"].tolist(), strict=True):
            face["quality"] = {
                "side": round(side, 1),
                "sharpness": round(sharpness, 1),
                "yaw": round(yaw, 3),
                "pitch": round(pitch, 3),
            }
    return faces
