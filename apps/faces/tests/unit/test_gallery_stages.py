"""The gallery's stages, and shards that are merged."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from torchship.errors import BadInput, NotFound
from torchship.pipeline import Composed, plan
from torchship.pipeline.config import convert
from torchship.stage import FunctionStage
from torchship_faces.gallery import Enrol, Enrolment, Forget, Gallery, Match

VECTORS = np.random.default_rng(0).standard_normal((40, 16)).astype(np.float32)


def options(root: Path) -> dict[str, object]:
    return {"gallery": str(root), "model": "m", "width": 16}


def names(*people: str) -> np.ndarray[tuple[int], np.dtype[np.object_]]:
    return np.array([person.encode() for person in people], np.object_)


def test_enrol_match_forget(tmp_path: Path) -> None:
    given = options(tmp_path)
    enrol, match, forget = (FunctionStage(body, options=given) for body in (Enrol, Match, Forget))
    enrolled = enrol({"person": names("ann"), "embedding": VECTORS[:2]}, {"groups": "a, b"})
    assert enrolled["templates"].tolist() == [2]
    enrol({"person": names("bob"), "embedding": VECTORS[2:3]})
    found = match({"embedding": VECTORS[:4]}, {"top": 2, "threshold": 0.9})
    assert found["person"].tolist() == [b"ann", b"ann", b"bob", b""]
    assert found["known"].tolist() == [True, True, True, False]
    assert [entry["person"] for entry in msgspec.json.decode(found["nearest"][0])] == ["ann", "bob"]
    assert match({"embedding": VECTORS[2:3]}, {"group": "b"})["person"].tolist() == [b""]
    assert forget({"person": names("ann")}, {"compact": True})["templates"].tolist() == [2]
    assert match({"embedding": VECTORS[:1]}, {"threshold": 0.9})["known"].tolist() == [False]
    with pytest.raises(NotFound):
        forget({"person": names("ann")})
    with pytest.raises(BadInput):
        match({"embedding": VECTORS[:1]}, {"threshold": 2.0})
    for stage in (enrol, match, forget):
        stage.close()


def test_an_empty_gallery_knows_nobody(tmp_path: Path) -> None:
    found = FunctionStage(Match, options=options(tmp_path))({"embedding": VECTORS[:2]})
    assert found["person"].tolist() == [b"", b""]
    assert found["nearest"].tolist() == [b"[]", b"[]"]


def test_shards_answer_as_one_gallery(tmp_path: Path) -> None:
    whole = Gallery(tmp_path / "whole", model="m", width=16)
    parts = [Gallery(tmp_path / f"part{n}", model="m", width=16) for n in range(2)]
    for number, vector in enumerate(VECTORS[:30]):
        item = Enrolment(person=f"p{number}", vectors=vector[None])
        whole.enrol([item])
        parts[number % 2].enrol([item])
    shards = [
        {
            "run": "torchship_faces.gallery:Match",
            "name": f"shard{n}",
            "options": options(tmp_path / f"part{n}"),
            "parameters": {"threshold": -1.0},
            "outputs": {name: f"{name}_{n}" for name in ("person", "known", "similarity", "nearest")},
        }
        for n in range(2)
    ]
    merge = {"run": "torchship_faces.gallery:Merge", "options": {"shards": 2}, "parameters": {"threshold": 0.8}}
    sharded = Composed(plan(convert({"name": "sharded", "stages": [*shards, merge]})))
    single = FunctionStage(Match, options=options(tmp_path / "whole"))
    asked = {"top": 3}
    found, expected = (
        sharded({"embedding": VECTORS}, asked),
        single({"embedding": VECTORS}, {**asked, "threshold": 0.8}),
    )
    for name in ("person", "known"):
        assert found[name].tolist() == expected[name].tolist()
    assert np.allclose(found["similarity"], expected["similarity"])
    for ours, theirs in zip(found["nearest"], expected["nearest"], strict=True):
        for one, other in zip(msgspec.json.decode(ours), msgspec.json.decode(theirs), strict=True):
            assert one["person"] == other["person"]
            assert one["similarity"] == pytest.approx(other["similarity"], abs=1e-5)
    assert found["known"].tolist() == [True] * 30 + [False] * 10
    sharded.close()
