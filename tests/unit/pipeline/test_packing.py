"""A pipeline published as an artifact: complete, opened like a model, and without trust only what is plain."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import torchship
from tests.unit.artifact.made import colour
from tests.unit.artifact.test_opening import edit
from tests.unit.pipeline.test_plan import BODIES
from tests.unit.stages.test_images import encoded, request
from torchship.artifact import Artifact, Store, open_artifact
from torchship.artifact.package import amend
from torchship.errors import BadConfig, CorruptArtifact, UnsafeArtifact
from torchship.pipeline import Composed, PipelineConfig, StageConfig, pack_pipeline, plan, plan_target

PLAIN = {"size": 8, "mean": [0.0], "std": [1.0]}
RED = request(encoded(Image.new("RGB", (20, 10), "red"), "PNG"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with a model that names colours."""
    colour(tmp_path / "a", labels=())
    store = Store(tmp_path / "store")
    store.publish(tmp_path / "a", name="colour")
    return store


def packed(store: Store, folder: Path) -> Artifact:
    """Picture, model, names; the names come from a file."""
    (folder.parent / "names.txt").write_text("red\ngreen\nblue\n")
    stages = (
        StageConfig(run="torchship.stages.images:Classify", options=PLAIN),
        StageConfig(artifact="colour", threads=1),
        StageConfig(run="torchship.stages.labels:TopK", options={"labels": str(folder.parent / "names.txt")}),
    )
    config = PipelineConfig("colours", stages, parameters={"top_k": 2})
    return pack_pipeline(plan(config, store), folder, store=store)


def test_it_holds_all_it_needs_and_opens_like_a_model(store: Store, tmp_path: Path) -> None:
    artifact = packed(store, tmp_path / "p")
    assert artifact.manifest.kind == "pipeline"
    other = Store(tmp_path / "other")
    other.publish(tmp_path / "p", name="colours")
    shutil.rmtree(store.root)  # neither the model nor the file of names is needed any more
    (tmp_path / "names.txt").unlink()
    found = torchship.open("colours", store=other, threads=1)
    assert isinstance(found, Composed)
    assert str(found.signature) == str(artifact.manifest.signature)
    answer = found({"image": RED})
    assert answer["labels"].tolist()[0][0] == b"red"
    assert answer["labels"].shape == (1, 2)  # the pipeline's own default
    assert found({"image": RED}, {"top_k": 1})["labels"].shape == (1, 1)
    found.close()


def test_the_plan_shows_its_stages(store: Store, tmp_path: Path) -> None:
    packed(store, tmp_path / "p")
    found = plan_target(tmp_path / "p", threads=2)
    assert [node.name for node in found.nodes] == ["classify", "colour", "topk"]
    assert found.nodes[1].config.threads == 2
    assert {p.name: p.default for p in found.parameters} == {"top_k": 2}


def test_it_can_be_a_stage_of_another_pipeline(store: Store, tmp_path: Path) -> None:
    packed(store, tmp_path / "p")
    stages = (
        StageConfig(
            artifact=str(tmp_path / "p"),
            name="what",
            inputs={"image": "photo"},
            outputs={"labels": "names"},
            parameters={"top_k": 1},
        ),
        StageConfig(run="torchship.stages.images:Decode", inputs={"image": "photo"}),
    )
    found = plan(PipelineConfig("both", stages, outputs=("names", "size", "what.scores")), store)
    assert [node.name for node in found.nodes] == ["what.classify", "what.colour", "what.topk", "decode"]
    answer = Composed(found, store)({"photo": RED})
    assert answer["names"].tolist() == [[b"red"]]
    assert answer["size"].tolist() == [[10, 20]]
    with pytest.raises(BadConfig, match=r"stages\[0\].parameters: the stage has no parameter \['nope'\]"):
        plan(PipelineConfig("x", (StageConfig(artifact=str(tmp_path / "p"), parameters={"nope": 1}),)), store)


def test_it_can_be_published_as_part_of_another(store: Store, tmp_path: Path) -> None:
    packed(store, tmp_path / "p")
    store.publish(tmp_path / "p", name="what")
    stages = (
        StageConfig(artifact="what", outputs={"labels": "names"}, parameters={"top_k": 1}),
        StageConfig(run="torchship.stages.images:Decode", inputs={"image": "image"}),
    )
    outer = plan(PipelineConfig("both", stages, outputs=("names", "size", "what.scores")), store)
    pack_pipeline(outer, tmp_path / "q", store=store)
    pack_pipeline(plan_target(tmp_path / "q"), tmp_path / "r")  # and once more, alone
    shutil.rmtree(store.root)
    for folder in ("q", "r"):
        found = torchship.open(tmp_path / folder)
        answer = found({"image": RED})
        assert answer["names"].tolist() == [[b"red"]]
        assert answer["scores"].shape == (1, 1)
        assert answer["size"].tolist() == [[10, 20]]
        found.close()
    names = [node.name for node in plan_target(tmp_path / "r").nodes]
    assert names == [node.name for node in outer.nodes] == ["what.classify", "what.colour", "what.topk", "decode"]


def change(root: Path, **stage: Any) -> None:
    """Change the first stage as an attacker would, with all hashes right."""
    import msgspec

    path = root / "pipeline.json"
    config = msgspec.json.decode(path.read_bytes())
    config["stages"][0].update(stage)
    path.unlink()
    edit(root, lambda m: m.update(files=[f for f in m["files"] if f["path"] != "pipeline.json"]))
    path.write_bytes(msgspec.json.encode(config))
    amend(root)


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"run": "os:system"}, "runs os:system"),
        ({"run": "torchship_faces.gallery:Gallery"}, "runs torchship_faces.gallery"),
        ({"run": "", "artifact": "colour"}, "opens colour, which is not part of it"),
        ({"run": "", "remote": "grpc://10.0.0.1:1/x"}, "asks another server"),
        ({"run": "torchship.stages.labels:TopK", "options": {"labels": "/etc/passwd"}}, "names a file outside"),
    ],
)
def test_without_trust_only_plain_stages_run(store: Store, tmp_path: Path, stage: dict[str, Any], words: str) -> None:
    packed(store, tmp_path / "p")
    change(tmp_path / "p", **stage)
    with pytest.raises(UnsafeArtifact) as caught:
        plan_target(tmp_path / "p")
    assert words in str(caught.value)


def test_no_path_leads_out(store: Store, tmp_path: Path) -> None:
    packed(store, tmp_path / "p")
    change(tmp_path / "p", run="torchship.stages.labels:TopK", options={"labels": "artifact:../../names.txt"})
    with pytest.raises(UnsafeArtifact, match="leaves the artifact's folder"):
        plan_target(tmp_path / "p", trust=True)


def test_no_pipeline_holds_itself(store: Store, tmp_path: Path) -> None:
    packed(store, tmp_path / "p")
    change(tmp_path / "p", run="", options={}, artifact="artifact:.")
    with pytest.raises((UnsafeArtifact, CorruptArtifact)):
        plan_target(tmp_path / "p", trust=True)


def test_foreign_python_stages_need_trust(tmp_path: Path) -> None:
    stages = (StageConfig(run=f"{BODIES}:double"),)
    pack_pipeline(plan(PipelineConfig("twice", stages)), tmp_path / "p")
    with pytest.raises(UnsafeArtifact, match="runs tests"):
        torchship.open(str(tmp_path / "p"))
    stage = torchship.open(str(tmp_path / "p"), trust=True)
    assert stage({"x": np.ones((1, 2), np.float32)})["y"].tolist() == [[2, 2]]


def test_damage_is_found(store: Store, tmp_path: Path) -> None:
    packed(store, tmp_path / "p")
    model = next((tmp_path / "p" / "models").glob("*/backend/model.onnx"))
    model.write_bytes(b"no")
    with pytest.raises(CorruptArtifact):
        torchship.open(str(tmp_path / "p"))


def test_native_models_stay_native(store: Store, tmp_path: Path) -> None:
    root = store.resolve("colour")
    edit(root, lambda m: m["files"][0].update(kind="native"))
    artifact = packed(store, tmp_path / "p")
    kinds = {entry.path: entry.kind for entry in artifact.manifest.files}
    assert kinds["models/1_colour/backend/model.onnx"] == "native"
    assert open_artifact(tmp_path / "p").manifest == artifact.manifest
    with pytest.raises(UnsafeArtifact):
        torchship.open(str(tmp_path / "p"))
    torchship.open(str(tmp_path / "p"), trust=True, threads=1).close()
    path = tmp_path / "p" / "pipeline.json"  # that it trusts itself is no reason to trust it
    text = path.read_text().replace('"threads": 1', '"threads": 1, "trust": true')
    assert '"trust"' in text
    path.unlink()
    edit(tmp_path / "p", lambda m: m.update(files=[f for f in m["files"] if f["path"] != "pipeline.json"]))
    path.write_text(text)
    amend(tmp_path / "p")
    with pytest.raises(UnsafeArtifact):
        torchship.open(str(tmp_path / "p"))


def test_only_into_an_empty_folder(store: Store, tmp_path: Path) -> None:
    packed(store, tmp_path / "p")
    with pytest.raises(BadConfig, match="is not empty"):
        packed(store, tmp_path / "p")
