"""The examples, each in a small form: searched, packed, opened from disk and asked."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from examples.branching import model as branching
from examples.detector import boxes, scenes
from examples.detector.model import BACKBONES, Detector, csp
from examples.text import sentences
from examples.text.model import minilm

from torchship import plugins
from torchship.optimize import search
from torchship.optimize.capture import capture
from torchship.optimize.measure import Effort
from torchship.optimize.targets import recipes_at
from torchship.recipe import Recipe
from torchship.stage import Stage
from torchship.tensors import Signature, TensorSpec


def _packed(module: torch.nn.Module, inputs: list[str], recipe: Recipe, place: Path, data: Sequence[Any] = ()) -> Stage:
    """What a trial does, in this process: build, then open what lies on disk."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = capture(module, [TensorSpec.parse(text) for text in inputs], calibration=data or None)
        backend = plugins.load("backends", name=recipe.backend)
        place.mkdir()
        backend.build(model, options=recipe.options, out=place)
        stage: Stage = backend.open(place, signature=model.signature, options=recipe.options, threads=1)
    return stage


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_gives_boxes_of_one_shape(name: str) -> None:
    with torch.inference_mode():
        found = Detector(name).eval()(torch.rand(2, 3, 160, 160))
    assert {key: tuple(value.shape) for key, value in found.items()} == {"boxes": (2, 525, 4), "scores": (2, 525, 3)}
    assert bool((found["boxes"][..., :2] <= found["boxes"][..., 2:]).all())


def test_the_detector_is_packed_with_a_precision_for_each_part(tmp_path: Path) -> None:
    recipe = recipes_at("examples/detector/recipes.toml")[0]
    data = [batch for batch, _ in zip(scenes.calibration(), range(3), strict=False)]
    inputs = ["image:FP32[-1,3,160,160]"]
    module = csp()
    stage = _packed(module, inputs, recipe, tmp_path / "mixed", data)
    assert scenes.f1(stage, pictures=30) > 0.9  # the weights in the folder are trained
    head = sum(tensor.nbytes for tensor in module.head.parameters())
    rest = sum(tensor.nbytes for tensor in (*module.backbone.parameters(), *module.neck.parameters()))
    size = (tmp_path / "mixed" / "model.bin").stat().st_size
    assert head + rest / 4 == pytest.approx(size, rel=0.15)  # four bytes a weight in the head, one in the rest
    stage.close()


def test_the_threshold_belongs_to_the_call() -> None:
    given = np.asarray([[[0, 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30], [0, 0, 10, 10]]], np.float32)
    scores = np.asarray([[[0.9, 0], [0.8, 0], [0.3, 0], [0, 0.5]]], np.float32)
    found, confidence, kind = boxes.detections(given, scores)
    assert confidence.tolist() == pytest.approx([0.9, 0.5])  # the second is the first once more, the third too weak
    assert kind.tolist() == [0, 1]
    assert found.shape == (2, 4)
    assert len(boxes.detections(given, scores, threshold=0.2)[0]) == 3
    assert len(boxes.detections(given, scores, threshold=0.2, overlap=0.9)[0]) == 4
    assert boxes.detections(given, scores, threshold=1.0)[0].shape == (0, 4)


def test_sentences_of_any_length_keep_their_meaning(tmp_path: Path) -> None:
    inputs = ["ids:INT64[-1,length:1..512]", "mask:INT64[-1,length:1..512]"]
    stage = _packed(minilm(), inputs, Recipe("onnxruntime", {"precision": "fp32"}), tmp_path / "minilm")
    assert sentences.margin(stage) > 0.15
    vectors = stage(sentences.encode(["A short one.", "A kitten is napping on the couch. " * 30]))["embedding"]
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1], abs=1e-4)
    good, bad = sentences.similarities(stage)[1]
    assert good > 0.7 > 0.5 > bad
    stage.close()


def test_the_rewrites_of_the_cascade_answer_alike() -> None:
    modules = [branching.cascade(), branching.chosen(), branching.conditional()]
    rows = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    sure = [row[None] for row in rows if modules[0].small(row[None]).softmax(1).max() > 0.9]
    assert 0 < len(sure) < 64
    with torch.inference_mode():
        for batch in (rows[:1], torch.cat(sure), rows):
            first, *others = (module(batch) for module in modules)
            assert all(torch.allclose(first, other, atol=1e-6) for other in others)


def test_python_that_no_exporter_reads_runs_its_parts_elsewhere(tmp_path: Path) -> None:
    report = search.optimize(
        branching.routed(),
        torch.randn(8, 32),
        batched=True,
        backends=["onnxruntime"],
        recipes=[Recipe("hybrid", {"parts": "onnxruntime"})],
        store=tmp_path / "store",
        cache=tmp_path / "cache",
        effort=Effort(seconds=0.05, calls=5, max_batch=2),
        threads=1,
    )
    eager, cut = report.trials
    assert "examples/branching/model.py:" in eager.failure
    assert cut.status == "ok", cut.failure
    assert any("batched as told" in note for note in report.facts.notes)
    assert report.artifact is not None
    assert {entry.path for entry in report.artifact.manifest.files} >= {"backend/parts/0/model.onnx"}
    rows = torch.randn(64, 32, generator=torch.Generator().manual_seed(3))
    stage = report.artifact.open(threads=1, trust=True)
    with torch.inference_mode():
        assert np.allclose(stage({"x": rows.numpy()})["output"], branching.routed()(rows).numpy(), atol=1e-4)
    stage.close()


def test_a_branch_is_kept_by_what_wins(tmp_path: Path) -> None:
    module = branching.cascade()
    report = search.optimize(
        module,
        [TensorSpec.parse("x:FP32[-1,32]")],
        recipes=[Recipe("onnxruntime", {"precision": "fp32"})],
        store=tmp_path / "store",
        cache=tmp_path / "cache",
        effort=Effort(seconds=0.05, calls=5, max_batch=2),
        threads=1,
    )
    assert report.artifact is not None
    signature: Signature = report.artifact.manifest.signature
    assert not signature.batched  # the branch looks at the whole batch
    assert all(trial.status == "ok" or trial.failure for trial in report.trials)
    stage = report.artifact.open(threads=1, trust=True)
    rows = torch.randn(64, 32, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        sure = rows[module.small(rows).softmax(1).amax(1) > 0.9]
        for batch in (sure, rows):  # the two ways through the cascade
            answer = stage({"x": batch.numpy()})[signature.outputs[0].name]
            assert np.allclose(answer, module(batch).numpy(), atol=1e-4)
    stage.close()
