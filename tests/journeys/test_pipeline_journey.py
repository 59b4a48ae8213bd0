"""A pipeline on its way: published as one artifact, served, then spread over several servers, one of which dies."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.journeys.test_server_process import Running, serving
from tests.unit.artifact.made import colour
from tests.unit.stages.test_images import encoded
from torchship.artifact import Store
from torchship.pipeline import PipelineConfig, StageConfig, pack_pipeline, plan

PLAIN = "{size = 8, mean = [0.0], std = [1.0]}"
FRONT = """
[[model]]
name = "spread"
stages = [
  {{run = "torchship.stages.images:Classify", options = {plain}}},
  {{remote = {urls}, name = "far", copies = 2, options = {{timeout = 5.0, breaker_pause = 0.2}}}},
  {{run = "torchship.stages.labels:TopK", options = {{labels = ["red", "green", "blue"]}}}},
]
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A store with a model and a pipeline that names colours."""
    colour(tmp_path / "colour")
    store = Store(tmp_path / "store")
    store.publish(tmp_path / "colour", name="colour")
    stages = (
        StageConfig(run="torchship.stages.images:Classify", options={"size": 8, "mean": [0.0], "std": [1.0]}),
        StageConfig(artifact="colour", threads=1),
        StageConfig(run="torchship.stages.labels:TopK"),
    )
    pack_pipeline(plan(PipelineConfig("what", stages), store), tmp_path / "what", store=store)
    store.publish(tmp_path / "what", name="what")
    return store.root


def names(server: Running, model: str, picture: bytes, query: str = "") -> list[str]:
    """What the served pipeline calls a picture's colour, best first."""
    headers = {"Content-Type": "image/png"}
    request = urllib.request.Request(f"{server.url}/v2/models/{model}/infer{query}", data=picture, headers=headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        outputs: list[dict[str, Any]] = json.load(answer)["outputs"]
    labels: list[str] = outputs[0]["data"]
    return labels


def name(server: Running, model: str, picture: bytes) -> str:
    """The best name alone."""
    return names(server, model, picture)[0]


def test_published_served_spread_and_still_there(root: Path, tmp_path: Path) -> None:
    pictures = {tint: encoded(Image.new("RGB", (20, 10), tint)) for tint in ("red", "blue")}
    store = f'[store]\nroot = "{root}"\n'
    back = store + '[[model]]\nname = "colour"\nartifact = "colour"\n[[model]]\nname = "what"\nartifact = "what"\n'
    folders = [tmp_path / folder for folder in ("one", "two", "front")]
    for folder in folders:
        folder.mkdir()
    with serving(back, folders[0]) as one, serving(back, folders[1]) as two:
        assert {tint: name(one, "what", data) for tint, data in pictures.items()} == {"red": "red", "blue": "blue"}
        assert len(names(one, "what", pictures["red"])) == 3
        assert names(one, "what", pictures["red"], "?top_k=1") == ["red"]
        with pytest.raises(urllib.error.HTTPError, match="400"):
            names(one, "what", pictures["red"], "?top_k=none")
        urls = [server.url.replace("http:", "grpc:") + "/colour" for server in (one, two)]
        text = FRONT.format(plain=PLAIN, urls=json.dumps(urls))
        with serving(text, folders[2]) as front, ThreadPoolExecutor(4) as pool:
            asked = ["red", "blue"] * 10
            assert list(pool.map(lambda tint: name(front, "spread", pictures[tint]), asked)) == asked
            one.child.kill()
            assert list(pool.map(lambda tint: name(front, "spread", pictures[tint]), asked)) == asked
