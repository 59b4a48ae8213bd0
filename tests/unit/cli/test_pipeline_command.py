"""`torchship pipeline` as a user types it: check, draw, publish, and then predict with what was published."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.unit.artifact.made import colour
from tests.unit.cli.test_artifact_commands import torchship
from tests.unit.pipeline.test_plan import BODIES
from torchship.artifact import Store
from torchship.errors import BadConfig, BadInput, GuardRefused, NotFound

CLASSIFY = """
parameters = {top_k = 2}
stages = [
  {run = "torchship.stages.images:Classify", options = {size = 8, mean = [0.0], std = [1.0]}, copies = 2},
  {artifact = "colour", threads = 1},
  {run = "torchship.stages.labels:TopK"},
]
"""
BRANCHES = f"""
outputs = ["y", "total"]
stages = [
  {{run = "{BODIES}:parse"}},
  {{run = "{BODIES}:double"}},
  {{run = "{BODIES}:add_up", inputs = {{x = "parse.numbers"}}}},
  {{run = "{BODIES}:score"}},
]
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two pipelines and a picture, and a store with a model."""
    monkeypatch.setenv("TORCHSHIP_STORE", str(tmp_path / "store"))
    colour(tmp_path / "a")
    Store().publish(tmp_path / "a", name="colour")
    (tmp_path / "classify.toml").write_text(CLASSIFY)
    (tmp_path / "branches.toml").write_text(BRANCHES)
    Image.new("RGB", (30, 20), (200, 10, 10)).save(tmp_path / "red.png")
    return tmp_path


def test_check(here: Path) -> None:
    text = torchship("pipeline", "check", here / "classify.toml").output
    assert "3 stages fit together" in text
    assert "top_k from 1 to 1000, by default 2: how many classes" in text
    facts = json.loads(torchship("pipeline", "check", here / "classify.toml", "--json").output)
    assert facts["max_batch"] == 1
    (here / "classify.toml").write_text(CLASSIFY.replace("size = 8", "size = 9"))
    with pytest.raises(BadConfig, match=r"^\$\.stages\[1\]\.inputs: "):
        torchship("pipeline", "check", here / "classify.toml")


def test_the_store_of_a_servers_file_is_found_beside_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHSHIP_STORE", str(here / "elsewhere"))
    pipeline = CLASSIFY.replace("parameters", "[store]\nroot = 'store'\n[[model]]\nname = 'm'\nparameters")
    (here / "serve.toml").write_text(pipeline)
    assert "m: 3 stages fit together" in torchship("pipeline", "check", here / "serve.toml").output


def test_draw(here: Path) -> None:
    text = torchship("pipeline", "draw", here / "branches.toml", "--svg", here / "b.svg").output
    assert "takes x:FP32[-1,2]  <- parse.numbers" in text
    assert "runs beside double" in text
    assert "answer       takes total:FP32[-1]  <- add_up.total" in text
    assert "nobody takes score.score, score.rows" in text
    root = ET.fromstring((here / "b.svg").read_text())  # we wrote it
    words = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"request", "parse", "double", "add_up", "score", "answer"} <= set(words)
    boxes = [(r.get("x"), r.get("y")) for r in root.iter("{http://www.w3.org/2000/svg}rect")]
    assert len(set(boxes)) == 6
    stages = 'stages = [{run = "torchship.stages.images:Decode", name = "answer"}]'
    (here / "named.toml").write_text(stages)  # a stage may be called like the end of the drawing
    torchship("pipeline", "draw", here / "named.toml", "--svg", here / "n.svg")
    titles = [
        text.text for text in ET.fromstring((here / "n.svg").read_text()).iter("{http://www.w3.org/2000/svg}text")
    ]
    assert titles.count("answer") == 2
    assert "up to 2 at once" in torchship("pipeline", "draw", here / "classify.toml").output


def test_publish_then_use_it_like_a_model(here: Path) -> None:
    file = here / "classify.toml"
    found = torchship("pipeline", "publish", file, "--name", "cls", "--example", here / "red.png")
    assert "published cls@1" in found.output
    inspected = torchship("inspect", "cls").output
    assert "pipeline.json" in inspected
    assert "torchship.stages.images:Classify" in inspected
    lines = torchship("predict", "cls", "--input", here / "red.png", "--threads", "1").output.splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("red")
    assert torchship("predict", file, "--input", here / "red.png").output.splitlines() == lines
    one = torchship("predict", "cls", "--input", here / "red.png", "--parameter", "top_k=1", "--threads", "1").output
    assert len(one.splitlines()) == 1
    assert "3 stages" in torchship("pipeline", "check", "cls").output
    with pytest.raises(BadInput, match="not a picture"):
        torchship("pipeline", "publish", file, "--example", file)


def test_preprocessing_is_compared_with_the_training_code(here: Path) -> None:
    file, red = here / "classify.toml", here / "red.png"
    picture = Image.open(red).resize((12, 8), Image.Resampling.BILINEAR).crop((2, 0, 10, 8))
    pixels = np.asarray(picture, np.float32).transpose(2, 0, 1)[None] / 255
    np.savez(here / "good.npz", pixels=pixels, logits=pixels.mean((2, 3)) * 10)
    found = torchship("pipeline", "publish", file, "--example", red, "--expect", here / "good.npz")
    assert "pixels: relative error" in found.output
    assert "published classify@1" in found.output
    np.savez(here / "bad.npz", pixels=pixels[:, ::-1])
    with pytest.raises(GuardRefused, match="'pixels' is off by"):
        torchship("pipeline", "publish", file, "--example", red, "--expect", here / "bad.npz")
    assert Store().versions("classify") == (1,)
    np.savez(here / "bad.npz", nope=pixels)
    with pytest.raises(BadConfig, match="no stage gives 'nope'"):
        torchship("pipeline", "publish", file, "--example", red, "--expect", here / "bad.npz")
    with pytest.raises(BadInput, match="needs --example"):
        torchship("pipeline", "publish", file, "--expect", here / "bad.npz")


def test_files_that_options_name_travel_and_what_is_missing_is_found(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(here)
    stage = '{run = "torchship.stages.labels:TopK", options = {labels = "names.txt"}}'
    (here / "named.toml").write_text(f'name = "named"\nstages = [{stage}]\n')
    for verb in ("check", "publish"):
        with pytest.raises(NotFound, match=r"no file names\.txt"):
            torchship("pipeline", verb, "named.toml")
    (here / "names.txt").write_text("ant\nbee\n")
    torchship("pipeline", "check", "named.toml")
    torchship("pipeline", "publish", "named.toml")
    (here / "names.txt").unlink()
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "x.npy", np.array([[0, 9]], np.float32))
    assert "bee" in torchship("predict", "named", "--input", tmp_path / "x.npy").output
