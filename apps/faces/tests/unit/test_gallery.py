"""The gallery: enrolment, search above and below the exact size, groups, forgetting, several handles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from torchship.errors import BadInput, CorruptArtifact, Denied, NotFound
from torchship_faces.gallery import Enrolment, Gallery, Hit
from torchship_faces.gallery.codes import Codes, rotation
from torchship_faces.gallery.gallery import noisy_copies

WIDTH = 64


def people(count: int, *, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((count, WIDTH), dtype=np.float32)


def opened(root: Path, *, exact_below: int = 1000, model: str = "model-a") -> Gallery:
    return Gallery(root / "gallery", model=model, width=WIDTH, exact_below=exact_below)


def rounded(found: list[list[Hit]]) -> list[list[tuple[str, int, object]]]:
    """Hits that compare equal when their similarities differ by rounding only."""
    return [[(hit.person, hit.serial, pytest.approx(hit.score, abs=1e-5)) for hit in line] for line in found]


def fill(gallery: Gallery, vectors: NDArray[np.float32], *, groups: tuple[str, ...] = ()) -> None:
    gallery.enrol([Enrolment(person=f"p{n}", vectors=vector[None], groups=groups) for n, vector in enumerate(vectors)])


@pytest.mark.parametrize("exact_below", [1000, 100])
def test_everyone_is_found_by_a_noisy_copy(tmp_path: Path, exact_below: int) -> None:
    gallery = opened(tmp_path, exact_below=exact_below)
    vectors = people(400)
    fill(gallery, vectors)
    queries = noisy_copies(vectors, similarity=0.8, random=np.random.default_rng(1))
    found = gallery.nearest(queries, count=2)
    assert [match[0].person for match in found] == [f"p{n}" for n in range(400)]
    assert all(abs(match[0].score - 0.8) < 0.01 and match[1].score <= match[0].score for match in found)
    exact = gallery.nearest(queries, count=2, exact=True)
    assert [[match.person for match in line] for line in found] == [[match.person for match in line] for line in exact]
    assert gallery.recall(similarity=0.8) == 1.0


@pytest.mark.parametrize("exact_below", [1000, 20])
def test_it_is_the_same_after_reopening_and_after_compacting(tmp_path: Path, exact_below: int) -> None:
    vectors = people(200)
    first = opened(tmp_path, exact_below=exact_below)
    fill(first, vectors, groups=("staff",))
    first.forget("p7")
    expected = rounded(first.nearest(vectors, count=3))
    first.close()
    second = opened(tmp_path, exact_below=exact_below)
    assert rounded(second.nearest(vectors, count=3)) == expected
    second.compact()
    assert rounded(second.nearest(vectors, count=3)) == expected
    third = opened(tmp_path, exact_below=exact_below)
    assert rounded(third.nearest(vectors, count=3)) == expected
    assert third.count() == (199, 199)
    assert third.person("p8").groups == ("staff",)


def test_a_group_is_a_filter(tmp_path: Path) -> None:
    gallery = opened(tmp_path, exact_below=50)
    vectors = people(300)
    for n, vector in enumerate(vectors):
        gallery.enrol([Enrolment(person=f"p{n}", vectors=vector[None], groups=(("even", "odd")[n % 2],))])
    found = gallery.nearest(vectors[:40], count=3, group="odd")
    assert all(int(match.person[1:]) % 2 for matches in found for match in matches)
    assert [found[n][0].person for n in range(1, 40, 2)] == [f"p{n}" for n in range(1, 40, 2)]
    assert gallery.nearest(vectors[:1], group="nobody") == [[]]
    assert len(gallery.page(group="odd", limit=1000)) == 150


def test_several_templates_make_one_person(tmp_path: Path) -> None:
    gallery = opened(tmp_path)
    vectors = people(6)
    serials = gallery.enrol([Enrolment(person="ann", vectors=vectors[:3], qualities=(0.5, 0.6, 0.7), about={"a": "1"})])
    gallery.enrol([Enrolment(person="bob", vectors=vectors[3:5], about={})])
    found = gallery.nearest(vectors[2:3], count=5)[0]
    assert [match.person for match in found] == ["ann", "bob"]
    assert found[0].serial == serials[0][2]
    assert gallery.forget("ann", serial=serials[0][2]) == 1
    assert gallery.nearest(vectors[2:3])[0][0].score < 0.9
    assert list(gallery.person("ann").templates) == serials[0][:2]
    gallery.enrol([Enrolment(person="ann", vectors=vectors[5:6], replace=True)])
    assert len(gallery.person("ann").templates) == 1
    assert gallery.nearest(vectors[0:1])[0][0].score < 0.9


def test_the_forgotten_are_gone_from_disk_after_compacting(tmp_path: Path) -> None:
    gallery = opened(tmp_path)
    vectors = people(3)
    face = b"\xff\xd8 a kept face"
    gallery.enrol(
        [Enrolment(person=f"secret-{n}", vectors=vectors[n : n + 1], faces=(face + bytes([n]),)) for n in (0, 1, 2)]
    )
    gallery.compact()
    unit = (vectors[1] / np.linalg.norm(vectors[1])).astype("<f2").tobytes()

    def on_disk(needle: bytes) -> bool:
        return any(needle in path.read_bytes() for path in (tmp_path / "gallery").rglob("*") if path.is_file())

    assert on_disk(unit)
    assert on_disk(b"secret-1")
    assert on_disk(face + b"\x01")
    gallery.forget("secret-1")
    assert not on_disk(face + b"\x01")
    gallery.compact()
    assert not on_disk(unit)
    assert not on_disk(b"secret-1")
    assert list(gallery.faces_of("secret-2").values()) == [face + b"\x02"]


def test_handles_see_each_other(tmp_path: Path) -> None:
    vectors = people(50)
    first, second = opened(tmp_path, exact_below=10), opened(tmp_path, exact_below=10)
    fill(first, vectors[:30])
    assert second.nearest(vectors[29:30])[0][0].person == "p29"
    second.forget("p29")
    assert first.nearest(vectors[29:30])[0][0].person != "p29"
    first.compact()
    second.enrol([Enrolment(person="late", vectors=vectors[40:41])])
    assert first.nearest(vectors[40:41])[0][0].person == "late"
    assert first.count() == second.count() == (30, 30)


def test_pages_follow_the_order_of_enrolment(tmp_path: Path) -> None:
    gallery = opened(tmp_path)
    fill(gallery, people(10))
    gallery.forget("p3")
    assert gallery.page(limit=4) == ["p0", "p1", "p2", "p4"]
    assert gallery.page(limit=4, after="p4") == ["p5", "p6", "p7", "p8"]
    with pytest.raises(NotFound):
        gallery.page(after="nobody")


def test_another_model_is_refused(tmp_path: Path) -> None:
    opened(tmp_path).close()
    with pytest.raises(Denied, match="model-a") as caught:
        opened(tmp_path, model="model-b")
    assert "re-embed" in caught.value.hint


@pytest.mark.parametrize(
    "vectors", [np.zeros((1, WIDTH)), np.full((1, WIDTH), np.nan), np.ones((1, 3)), np.ones(WIDTH)]
)
def test_bad_vectors_are_refused(tmp_path: Path, vectors: NDArray[np.float32]) -> None:
    gallery = opened(tmp_path)
    with pytest.raises(BadInput):
        gallery.enrol([Enrolment(person="ann", vectors=vectors)])
    with pytest.raises(BadInput):
        gallery.nearest(vectors)
    assert gallery.count() == (0, 0)


@pytest.mark.parametrize("name", ["", "../x", "a/b", "x" * 300, "a\nb"])
def test_odd_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadInput):
        opened(tmp_path).enrol([Enrolment(person=name, vectors=people(1))])


def test_a_torn_tail_is_cut_off_wherever_it_breaks(tmp_path: Path) -> None:
    vectors = people(3)
    gallery = opened(tmp_path)
    gallery.enrol([Enrolment(person="kept", vectors=vectors[:1])])
    log = next((tmp_path / "gallery").glob("log-*"))
    acknowledged = log.stat().st_size
    gallery.enrol([Enrolment(person="torn", vectors=vectors[1:2])])
    gallery.close()
    whole = log.read_bytes()
    for end in [*range(acknowledged, acknowledged + 20), len(whole) - 1]:
        for tail in (b"", bytes(16)):
            log.write_bytes(whole[:end] + tail)
            with_tail = opened(tmp_path)
            assert with_tail.count() == (1, 1), end
            with_tail.enrol([Enrolment(person="next", vectors=vectors[2:])])
            with_tail.close()
            again = opened(tmp_path)
            assert again.page() == ["kept", "next"]
            again.close()


def test_damage_in_the_middle_is_said_and_not_skipped(tmp_path: Path) -> None:
    gallery = opened(tmp_path)
    fill(gallery, people(3))
    gallery.close()
    log = next((tmp_path / "gallery").glob("log-*"))
    whole = bytearray(log.read_bytes())
    for position in (17, 25, 40):
        damaged = whole.copy()
        damaged[position] ^= 0xFF
        log.write_bytes(damaged)
        with pytest.raises(CorruptArtifact, match="byte"):
            opened(tmp_path)


def test_damaged_snapshots_are_refused(tmp_path: Path) -> None:
    gallery = opened(tmp_path)
    fill(gallery, people(3))
    gallery.compact()
    gallery.close()
    path = next((tmp_path / "gallery").glob("snapshot-*/rows.bin"))
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptArtifact, match="checksum"):
        opened(tmp_path)


def test_codes_are_the_same_after_loading() -> None:
    vectors = people(333)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    one, other = Codes(WIDTH), Codes(WIDTH)
    one.add(vectors[:100])
    other.load(one.packed(), rows=100)
    for codes in (one, other):
        codes.add(vectors[100:])
    assert np.array_equal(one.shortlist(vectors[:5], count=9)[1], other.shortlist(vectors[:5], count=9)[1])
    with pytest.raises(CorruptArtifact):
        Codes(WIDTH).load(b"x", rows=100)


@pytest.mark.parametrize(("width", "apart"), [(128, 0.18), (256, 0.5), (512, 1.0)])
def test_a_short_list_holds_the_nearest_in_a_crowd(width: int, apart: float) -> None:
    """dlib's vectors: 128 numbers, strangers at a cosine of 0.82, pictures of one person at 0.93."""
    random = np.random.default_rng(1)
    crowd = random.standard_normal((6000, width), dtype=np.float32)
    crowd *= np.sqrt(apart / (1 - apart) / width) if apart < 1 else 1
    crowd[:, 0] += apart < 1
    crowd /= np.linalg.norm(crowd, axis=1, keepdims=True)
    queries = noisy_copies(crowd[:100], similarity=1 - 0.4 * apart, random=random)
    nearest = (queries @ crowd.T).argmax(1)
    codes = Codes(width)
    codes.add(crowd)
    _, rows = codes.shortlist(queries, count=64)
    assert sum(best in line for best, line in zip(nearest, rows, strict=True)) == 100
    codes.close()


@pytest.mark.parametrize("width", [3, 64, 100, 512])
def test_the_rotation_keeps_lengths(width: int) -> None:
    turn = rotation(width)
    assert np.allclose(turn @ turn.T, np.eye(width), atol=1e-5)
