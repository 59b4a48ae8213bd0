"""Models that do not export: the code stays Python, the submodules that export run elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.unit.optimize import unexportable
from torchship import hardware, plugins
from torchship.errors import BuildFailed, CorruptArtifact, UnsafeArtifact
from torchship.optimize import search
from torchship.optimize.capture import capture
from torchship.optimize.measure import Effort
from torchship.optimize.strategies.cutting import cut
from torchship.optimize.trial import Status, Trial
from torchship.recipe import Recipe

SOURCE = "tests.unit.optimize.unexportable:make"
QUICK = Effort(seconds=0.02, calls=5, fewest=2, warm_up=0.01, max_batch=4)


@pytest.mark.parametrize("source", ["", SOURCE])
def test_parts_are_cut_built_and_put_back(tmp_path: Path, source: str) -> None:
    backend = plugins.load("backends", name="hybrid")
    assert backend.probe(hardware=hardware.here()) == ""
    torch.manual_seed(1)  # which rows go where depends on them
    model = capture(unexportable.make(), torch.randn(4, 8))
    backend.build(model, options={"source": source, "parts": "onnxruntime"}, out=tmp_path)
    plan = (tmp_path / "hybrid.json").read_text()
    assert '"path":"first"' in plan
    assert '"path":"second"' in plan
    assert (tmp_path / "parts" / "1" / "model.onnx").is_file()
    stage = backend.open(tmp_path, signature=model.signature, options={}, device="cpu", threads=1)
    for rows in (1, 4, 7):
        x = torch.randn(rows, 8)
        with torch.inference_mode():
            wanted = unexportable.make()(x)["scores"].numpy()
        np.testing.assert_allclose(stage({"x": x.numpy()})["scores"], wanted, rtol=1e-4, atol=1e-5)
    stage.close()


def test_a_source_that_makes_something_else_is_refused(tmp_path: Path) -> None:
    model = capture(torch.nn.Linear(8, 3), torch.randn(2, 8))
    with pytest.raises(BuildFailed, match="does not make this module again"):
        plugins.load("backends", name="hybrid").build(model, options={"source": SOURCE}, out=tmp_path)


def test_changed_code_is_refused_at_opening(tmp_path: Path) -> None:
    backend = plugins.load("backends", name="hybrid")
    model = capture(unexportable.make(), torch.randn(4, 8))
    backend.build(model, options={}, out=tmp_path)
    plan = tmp_path / "hybrid.json"
    digest = re.search(r'"tests.unit.optimize.unexportable:Block":"(\w+)"', plan.read_text())
    assert digest is not None
    plan.write_text(plan.read_text().replace(digest[1], "0" * 16))
    with pytest.raises(CorruptArtifact, match="unexportable:Block is not what it was"):
        backend.open(tmp_path, signature=model.signature, options={})


def test_a_plan_of_another_version_is_told_as_one(tmp_path: Path) -> None:
    (tmp_path / "hybrid.json").write_text('{"source":"","drawn":null,"digests":{},"args":[],"kwargs":{}}')
    with pytest.raises(CorruptArtifact, match="not what this version of torchship writes") as caught:
        plugins.load("backends", name="hybrid").open(
            tmp_path, signature=capture(torch.nn.Linear(8, 3), torch.randn(2, 8)).signature, options={}
        )
    assert "optimize the model again" in caught.value.hint


def test_the_search_falls_back_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3]))
    report = search.optimize(
        unexportable.make(), torch.randn(4, 8), backends=["onnxruntime"], effort=QUICK,
        cache=tmp_path / "cache", store=tmp_path / "store", name="searching",
    )  # fmt: skip
    by_label = {trial.recipe.label: trial for trial in report.trials}
    assert by_label["eager"].status == "failed"
    assert "unexportable.py:" in by_label["eager"].failure  # the user's own line
    assert by_label["hybrid"].status == "ok"
    assert by_label["hybrid parts=onnxruntime"].status == "ok"
    assert report.artifact is not None
    with pytest.raises(UnsafeArtifact):
        report.artifact.open()
    stage = report.artifact.open(trust=True)
    assert stage({"x": np.zeros((3, 8), np.float32)})["scores"].shape == (3, 3)
    stage.close()


def test_it_stands_in_where_what_eager_exported_was_refused(tmp_path: Path) -> None:
    (tmp_path / "backend").mkdir()
    (tmp_path / "backend" / "program.pt2").touch()
    model = capture(torch.nn.Linear(4, 2), torch.randn(2, 4))

    def proposed(status: Status) -> list[Recipe]:
        eager = Trial(Recipe("eager"), status, artifact=str(tmp_path))
        return cut([eager], model, source="", hardware=hardware.here(), among=[])

    assert proposed("ok") == []
    assert Recipe("hybrid") in proposed("refused")
