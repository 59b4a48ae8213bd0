"""Names of people, the pictures of a folder, and pictures as clients send them in JSON."""

from __future__ import annotations

import base64
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from torchship.errors import BadInput, NotFound
from torchship.tensors import Tensors
from torchship_faces.enrolment import Enrolled, enrol_folder, pictures_of
from torchship_faces.gallery import Enrolment, Gallery
from torchship_faces.recognizer import written
from torchship_faces.uploads import form_upload, group_names, picture_of

JOSE = unicodedata.normalize("NFD", "José")
# ruff: noqa: RUF001
NAMES = [
    *("José", "Иванова-Петрова", "प्रिया", "สมหญิง", "مُحَمَّد", "علی\u200cرضا", "བསྟན་འཛིན", "ג׳ורג׳", "김철수"),
    *("O'Brien", "D’Angelo", "'t Hooft", "Kaʻiulani", "レオ・ナルド", "山田\u3000太郎", "Gal·la"),
    *("Ann (HR)", "Smith, John", "ann@x.org"),
]


def book(root: Path, *, width: int = 4) -> Gallery:
    return Gallery(root / "gallery", model="m", width=width)


def enrol(gallery: Gallery, person: str, *groups: str) -> None:
    gallery.enrol([Enrolment(person=person, vectors=np.eye(4, dtype=np.float32)[:1], groups=groups)])


def test_names_of_every_script_are_kept(tmp_path: Path) -> None:
    gallery = book(tmp_path)
    for name in NAMES:
        enrol(gallery, name)
    assert gallery.page() == [unicodedata.normalize("NFC", name) for name in NAMES]
    assert len(set(gallery.page())) == len(NAMES)


@pytest.mark.parametrize(
    "name", ["a\tb", "a\u202eb", "a\x00b", ".x", " x", "a\\b", "<b>", "\u0301x", "\u200dx", "x" * 201]
)
def test_what_is_no_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadInput, match="cannot be the name of a person"):
        enrol(book(tmp_path), name)
    with pytest.raises(BadInput, match="cannot be the name of a group"):
        enrol(book(tmp_path), "ann", name)


def test_a_decomposed_name_is_the_same_person_everywhere(tmp_path: Path) -> None:
    gallery = book(tmp_path)
    enrol(gallery, "José", JOSE)
    enrol(gallery, JOSE)
    enrol(gallery, "jose")
    assert gallery.page() == ["José", "jose"]
    for name in ("José", JOSE):
        assert gallery.person(name).person == "José"
        assert len(gallery.vectors_of(name)) == 2
        assert gallery.page(after=name) == ["jose"]
        assert gallery.page(group=name) == ["José"]
        assert gallery.nearest(np.eye(4, dtype=np.float32)[:1], group=name)[0][0].person == "José"
    assert gallery.forget(JOSE) == 2
    with pytest.raises(NotFound):
        gallery.person("José")


def test_people_that_an_older_gallery_holds_decomposed_are_found(tmp_path: Path) -> None:
    from torchship_faces.gallery.records import Put, Template

    gallery, jamo = book(tmp_path), unicodedata.normalize("NFD", "김")  # letters of their own, which were names before
    template = Template(1, np.eye(4, dtype="<f2")[0].tobytes())
    with gallery._exclusive():
        gallery._append([Put(jamo, (template,))])
    enrol(gallery, jamo)
    assert gallery.page() == [jamo]
    assert len(gallery.person(jamo).templates) == 2


def draw(folder: Path, *files: str) -> None:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(file.encode())


def test_links_are_followed_and_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    people, elsewhere = tmp_path / "people", tmp_path / "elsewhere"
    draw(people, "ann/1.jpg", "ann/._1.jpg", ".trash/2.jpg", "x.jpg/notes.txt", "bob2.PNG", "emp/2024/1.jpg")
    draw(elsewhere, "1.jpg")
    (people / "cem").symlink_to(elsewhere)
    (people / "ann" / "2.jpg").symlink_to("/nowhere/2.jpg")
    (people / "ann" / "again").symlink_to(people)
    found = [(person, str(path.relative_to(people)), sure) for person, path, sure in pictures_of(people)]
    assert found == [
        ("ann", "ann/1.jpg", True),
        ("ann", "ann/2.jpg", True),
        ("ann", "ann/again", True),
        ("bob", "bob2.PNG", False),
        ("cem", "cem/1.jpg", True),
        ("emp", "emp/2024/1.jpg", False),
        ("x", "x.jpg", True),
    ]
    (tmp_path / "none").mkdir()
    with pytest.raises(NotFound, match="no pictures in"):
        list(pictures_of(tmp_path / "none"))


FACES = {b"1": [1, 0, 0, 0], b"2": [0, 1, 0, 0], b"3": [0.6, 0.8, 0, 0]}


def find(picture: bytes) -> Tensors:
    """One good face, which looks as the last letter of the picture's name says."""
    return {
        "box": np.array([[0, 0, 100, 100]], np.float32),
        "score": np.array([1], np.float32),
        "points": np.zeros((1, 5, 2), np.float32),
        "quality": np.array([[100, 300, 0, 0]], np.float32),
        "embedding": np.array([FACES[picture.removesuffix(b".jpg")[-1:]]], np.float32),
    }


def enrolled(folder: Path, gallery: Gallery, *, replace: bool = False) -> dict[str, Enrolled]:
    rows = enrol_folder(folder, find, gallery, threshold=0.5, keep_faces=False, replace=replace)
    return {os.path.relpath(row.file, folder): row for row in rows}


def test_a_number_that_does_not_count_never_makes_two_people_one(tmp_path: Path) -> None:
    draw(
        tmp_path / "p",
        "emp001.jpg",
        "emp002.jpg",
        "emp_3.jpg",
        "fay2.jpg",
        "gus/1.jpg",
        "gus/2.jpg",
        "hal/a/1.jpg",
        "hal/b/2.jpg",
    )
    gallery = book(tmp_path)
    rows = enrolled(tmp_path / "p", gallery)
    assert "does not agree with the other pictures of 'emp' (similarity 0.00" in rows["emp002.jpg"].refused
    assert not rows["emp_3.jpg"].refused  # 0.6 to the first
    assert not rows["fay2.jpg"].refused
    assert "differs from the other pictures" in rows["gus/2.jpg"].note  # the folder says that it is one person
    assert "does not agree" in rows["hal/b/2.jpg"].refused
    assert {name: len(gallery.vectors_of(name)) for name in gallery.page()} == {"emp": 2, "fay": 1, "gus": 2, "hal": 1}
    again = enrolled(tmp_path / "p", gallery, replace=True)
    assert "does not agree" in again["emp002.jpg"].refused
    assert {name: len(gallery.vectors_of(name)) for name in gallery.page()} == {"emp": 2, "fay": 1, "gus": 2, "hal": 1}


def test_one_picture_that_cannot_be_read_does_not_stop_the_others(tmp_path: Path) -> None:
    draw(tmp_path / "p", "ann/1.jpg", "zoe/2.jpg", "<odd>/3.jpg")
    (tmp_path / "p" / "ann" / "2.jpg").symlink_to("/nowhere")
    (tmp_path / "p" / "bob.jpg").mkdir()
    gallery = book(tmp_path)
    rows = enrolled(tmp_path / "p", gallery)
    assert {file for file, row in rows.items() if row.refused} == {"ann/2.jpg", "bob.jpg", "<odd>/3.jpg"}
    assert "No such file" in rows["ann/2.jpg"].refused
    assert "is a folder" in rows["bob.jpg"].refused
    assert gallery.page() == ["ann", "zoe"]


PICTURE = bytes(range(256)) + b"\xfb\xff"


@pytest.mark.parametrize(
    "text",
    [
        base64.b64encode(PICTURE).decode(),
        base64.b64encode(PICTURE).decode().rstrip("="),
        base64.encodebytes(PICTURE).decode(),
        base64.encodebytes(PICTURE).decode().replace("\n", "\r\n"),
        base64.urlsafe_b64encode(PICTURE).decode(),
        "data:image/jpeg;base64," + base64.b64encode(PICTURE).decode(),
        "data:;base64," + base64.encodebytes(PICTURE).decode(),
        "DATA:image/png;charset=utf-8;BASE64," + base64.b64encode(PICTURE).decode(),
    ],
)
def test_base64_as_clients_send_it(text: str) -> None:
    assert picture_of(text, where="$.image") == PICTURE


@pytest.mark.parametrize("text", ["a", "abc!", "data:image/jpeg,abc", "äöü", "YWJj=YWJj", "https://x.org/a.jpg"])
def test_what_is_no_base64_is_refused_with_its_place(text: str) -> None:
    with pytest.raises(BadInput, match=r"^\$\.images\[1\] is not base64"):
        picture_of(text, where="$.images[1]")


def test_a_picture_in_a_form_is_found_by_any_name() -> None:
    parts = [("file", PICTURE), ("name", "Zoë".encode()), ("images", PICTURE), ("groups", b"a, b"), ("first", PICTURE)]
    found = form_upload(parts)
    assert (found.images, found.first, found.second) == ([PICTURE, PICTURE], PICTURE, b"")
    assert (found.about, found.groups) == ({"name": "Zoë"}, ["a", "b"])


def test_groups_are_split_by_commas() -> None:
    assert group_names(" staff, night shift,,") == ["staff", "night shift"]


@pytest.mark.parametrize(("name", "says"), [("x.nix", "unknown file extension"), ("none/x.png", "No such file")])
def test_what_cannot_be_drawn_is_said_in_one_line(tmp_path: Path, name: str, says: str) -> None:
    with pytest.raises(BadInput, match=f"cannot be written: {says}"), written(tmp_path / name):
        Image.new("RGB", (1, 1)).save(tmp_path / name)
