"""Journey: people are enrolled from some pictures and recognized in others, by the real models, in one process."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from apps.faces.tests import face_kit
from PIL import Image

from torchship.errors import BadInput
from torchship.pipeline import Composed, plan
from torchship.pipeline.config import convert
from torchship.tensors import Tensors
from torchship_faces import recipes, weights
from torchship_faces.embedders import embedder
from torchship_faces.enrolment import RefusedFace, examine
from torchship_faces.gallery.gallery import Enrolment, Gallery


class Desk:
    """The identify pipeline and its gallery."""

    def __init__(self, gallery: Path) -> None:
        store = face_kit.store()
        self.pipeline = Composed(plan(convert(recipes.identify(str(gallery))), store), store)
        self.gallery = Gallery(gallery, model=embedder().space)

    def look(self, picture: bytes, **parameters: Any) -> Tensors:
        return self.pipeline({"image": np.array([picture], np.object_)}, parameters)

    def who(self, picture: bytes, **parameters: Any) -> list[str]:
        return [person.decode() for person in self.look(picture, **parameters)["person"]]

    def enrol(self, person: str, *pictures: bytes) -> None:
        faces = [examine(self.look(picture), picture=picture) for picture in pictures]
        vectors = np.stack([face.embedding for face in faces])
        self.gallery.enrol([Enrolment(person=person, vectors=vectors, faces=[face.kept for face in faces])])


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    made = Desk(tmp_path_factory.mktemp("faces") / "gallery")
    yield made
    made.pipeline.close()
    made.gallery.close()


def test_the_enrolled_are_recognized_and_others_stay_unknown(desk: Desk) -> None:
    obama3 = face_kit.picture("obama3")
    assert desk.who(obama3) == [""], "nobody is enrolled"
    desk.enrol("obama", face_kit.picture("obama"), face_kit.picture("obama2"))
    desk.enrol("biden", face_kit.picture("biden"))

    found = desk.look(obama3)
    assert found["person"].tolist() == [b"obama"]
    assert found["known"].tolist() == [True]
    assert found["similarity"][0] > 0.6
    assert desk.who(face_kit.picture("biden")) == ["biden"]

    unknown = desk.look(face_kit.stranger())
    assert unknown["known"].tolist() == [False]
    assert unknown["person"].tolist() == [b""]
    assert b'"unknown":true' in unknown["answer"][0]

    assert desk.who(obama3, threshold=0.99) == [""], "thresholds change with the request"
    assert desk.who(face_kit.stranger(), threshold=-1.0) != [""]
    assert desk.who(obama3, min_score=1.0) == [], "no face is that sure"

    desk.gallery.forget("obama")
    assert desk.who(obama3) == [""]
    assert desk.who(face_kit.picture("biden")) == ["biden"]


def test_many_faces_are_told_apart(desk: Desk) -> None:
    desk.enrol("obama", face_kit.picture("obama"))
    parts = [Image.open(weights.pictures() / name) for name in ("obama3.jpg", "biden.jpg")]
    crowd = Image.new("RGB", (1800, 800))
    for number, part in enumerate(parts):
        part.thumbnail((800, 800))
        crowd.paste(part, (number * 900, 0))
    found = desk.look(face_kit.encoded(crowd, "JPEG", quality=95))
    by_place = [person.decode() for _, person in sorted(zip(found["box"][:, 0], found["person"], strict=True))]
    assert by_place == ["obama", "biden"]
    with pytest.raises(RefusedFace, match="2 faces"):
        examine(found)


def test_one_identity_through_a_video(desk: Desk) -> None:
    shots = [face_kit.encoded(Image.fromarray(frame)) for frame in face_kit.frames(face_kit.video(), every=12)]
    assert len(shots) >= 8
    first = desk.look(shots[0], min_score=0.6)
    desk.gallery.enrol([Enrolment(person="driver", vectors=first["embedding"][:1])])
    seen = [desk.who(shot, min_score=0.6) for shot in shots]
    assert sum(names == ["driver"] for names in seen) >= 0.9 * len(shots), seen
    assert not {name for names in seen for name in names} - {"driver", ""}


@pytest.mark.parametrize(("mode", "kind"), [("L", "PNG"), ("RGBA", "PNG"), ("CMYK", "JPEG"), ("P", "GIF")])
def test_every_kind_of_picture_is_read(desk: Desk, mode: str, kind: str) -> None:
    image = Image.open(weights.pictures() / "biden.jpg")
    image.thumbnail((700, 700))
    found = desk.look(face_kit.encoded(image.convert(mode), kind))
    assert len(found["box"]) == 1
    vector = desk.look(face_kit.picture("biden"))["embedding"][0]
    assert found["embedding"][0] @ vector > 0.7


def test_pictures_without_a_face_have_an_empty_answer(desk: Desk) -> None:
    animated = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    for data in (
        face_kit.encoded(Image.new("RGB", (1, 1))),
        face_kit.encoded(Image.effect_noise((300, 200), 80)),
        face_kit.encoded(animated[0], "GIF", save_all=True, append_images=animated[1:]),
        face_kit.encoded(Image.new("RGB", (2000, 3))),
    ):
        found = desk.look(data)
        assert {name: len(found[name]) for name in ("box", "person", "embedding", "answer")} == {
            "box": 0, "person": 0, "embedding": 0, "answer": 1,
        }  # fmt: skip
        with pytest.raises(RefusedFace, match="no face"):
            examine(found)


def test_what_is_no_picture_is_refused_clearly(desk: Desk) -> None:
    whole = face_kit.picture("biden")
    huge = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body))
        for tag, body in ((b"IHDR", struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)), (b"IDAT", b""))
    )
    for data, word in ((b"hello", "not a picture"), (b"", "not a picture"), (whole[:5000], "broken"), (huge, "pixels")):
        with pytest.raises(BadInput, match=word):
            desk.look(data)


def test_the_gate_names_its_reason(desk: Desk) -> None:
    image = Image.open(weights.pictures() / "obama3.jpg")
    small = image.resize((image.width // 8, image.height // 8))
    with pytest.raises(RefusedFace, match="too small"):
        examine(desk.look(face_kit.encoded(small), min_score=0.5))
    blurred = image.resize((image.width // 12, image.height // 12)).resize(image.size)
    with pytest.raises(RefusedFace, match=r"blurred|not sure"):
        examine(desk.look(face_kit.encoded(blurred, "JPEG"), min_score=0.5))
