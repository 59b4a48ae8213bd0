"""The threshold for a false-match rate, and a gallery as a file."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from torchship.errors import BadInput, CorruptArtifact, Denied, NotFound
from torchship_faces import calibrate
from torchship_faces.gallery import Enrolment, Gallery, transfer
from torchship_faces.gallery.gallery import noisy_copies


def pairs(people: int = 30, pictures: int = 4, *, similarity: float = 0.85) -> calibrate.Pairs:
    random = np.random.default_rng(0)
    centres = random.standard_normal((people, 64), dtype=np.float32)
    each = noisy_copies(np.repeat(centres, pictures, 0), similarity=similarity, random=random)
    return calibrate.pairs_of(each, np.repeat(np.arange(people), pictures).tolist())


@pytest.mark.parametrize("target", [0.3, 0.05, 0.001])
def test_the_threshold_is_the_lowest_that_keeps_the_rate(target: float) -> None:
    given = pairs()
    found = calibrate.calibrate(given, target=target, rounds=50)
    assert (given.impostor >= found.threshold).mean() <= target
    lower = given.impostor[given.impostor < found.threshold].max()
    assert (given.impostor >= lower).mean() > target
    assert found.false_match.low <= found.false_match.value <= found.false_match.high
    assert found.threshold_low <= found.threshold <= found.threshold_high + 1e-9
    assert found.false_non_match.trials == len(given.genuine)


def test_too_little_data_is_said() -> None:
    assert "rule of three" in calibrate.calibrate(pairs(3), target=0.001, rounds=5).note
    assert calibrate.calibrate(pairs(), target=0.01, rounds=5).note == ""
    with pytest.raises(BadInput, match="two persons"):
        calibrate.pairs_of(np.eye(3, dtype=np.float32), [0, 0, 0])


def test_wilson_as_published() -> None:
    found = calibrate.rate(10, 100)
    assert (round(found.low, 3), round(found.high, 3)) == (0.055, 0.174)
    assert calibrate.rate(0, 20).low == 0.0


def test_the_plot_is_svg() -> None:
    given = pairs()
    root = ET.fromstring(calibrate.roc_svg(given, calibrate.calibrate(given, target=0.01, rounds=5)))
    assert root.tag.endswith("svg")
    assert any("threshold" in (node.text or "") for node in root.iter())


def filled(root: Path, *, model: str = "m") -> Gallery:
    gallery = Gallery(root, model=model, width=8)
    vectors = np.random.default_rng(1).standard_normal((5, 8)).astype(np.float32)
    first = Enrolment(person="ann", vectors=vectors[:3], groups=("a",), about={"x": "y"}, faces=(b"one", b"two"))
    gallery.enrol([first, Enrolment(person="bob", vectors=vectors[3:], qualities=(0.5, 0.25))])
    return gallery


@pytest.mark.parametrize("faces", [True, False])
def test_export_and_import_are_inverse(tmp_path: Path, faces: bool) -> None:
    old = filled(tmp_path / "old")
    assert transfer.export(old, tmp_path / "file", faces=faces) == 2
    new = Gallery(tmp_path / "new", model="m", width=8)
    for _ in range(2):
        assert transfer.load(new, tmp_path / "file") == 2
        assert new.count() == (2, 5)
    for name in ("ann", "bob"):
        before, after = old.person(name), new.person(name)
        assert (before.groups, before.about) == (after.groups, after.about)
        assert list(before.templates.values()) == list(after.templates.values())
        assert np.allclose(old.vectors_of(name), new.vectors_of(name), atol=1e-3)
    assert list(new.faces_of("ann").values()) == ([b"one", b"two"] if faces else [])


def test_odd_files_are_refused(tmp_path: Path) -> None:
    gallery = filled(tmp_path / "g")
    for content in (b"", b"nonsense" * 9, b"\xff" * 64):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(CorruptArtifact):
            transfer.load(gallery, tmp_path / "file")
    with pytest.raises(NotFound):
        transfer.load(gallery, tmp_path / "nothing")
    transfer.export(filled(tmp_path / "other", model="other"), tmp_path / "file")
    with pytest.raises(Denied, match="other"):
        transfer.load(gallery, tmp_path / "file")


def test_re_embedding_moves_to_another_space(tmp_path: Path) -> None:
    root = tmp_path / "g"
    filled(root).close()

    def embed(face: bytes) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        if face == b"two":
            raise BadInput("no face")
        return np.arange(1, 5, dtype=np.float32)

    moved, lost = transfer.re_embed(root, embed=embed, model="new", width=4, old_model="m", old_width=8)
    assert (moved, lost) == (1, ["bob"])
    new = Gallery(root, model="new", width=4)
    assert new.page() == ["ann"]
    assert new.person("ann").groups == ("a",)
    assert list(new.faces_of("ann").values()) == [b"one"]
    assert Gallery(tmp_path / "g.before-new", model="m", width=8).count() == (2, 5)
