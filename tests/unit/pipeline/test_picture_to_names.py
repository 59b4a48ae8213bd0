"""A picture goes in and names come out, through a real model file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.unit.artifact.made import colour
from tests.unit.stages.test_images import encoded, request
from torchship.artifact import Store
from torchship.errors import BadConfig
from torchship.pipeline import Composed, PipelineConfig, StageConfig, plan

CLASSIFY = "torchship.stages.images:Classify"


def stages(size: int) -> tuple[StageConfig, ...]:
    """Picture, model, names."""
    plain = {"size": size, "mean": [0.0], "std": [1.0]}
    return (
        StageConfig(run=CLASSIFY, options=plain),
        StageConfig(artifact="colour@current", threads=1),
        StageConfig(run="torchship.stages.labels:TopK"),
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with a model that names colours."""
    colour(tmp_path / "a")
    store = Store(tmp_path / "store")
    store.publish(tmp_path / "a", name="colour")
    return store


def test_names_come_out(store: Store) -> None:
    found = plan(PipelineConfig("p", stages(8)), store)
    assert found.labels == ("red", "green", "blue")
    assert found.signature.batched
    assert found.nodes[1].checked  # the plan proved that 8x8 pixels fit
    composed = Composed(found, store)
    pictures = [encoded(Image.new("RGB", (20, 10), name), "JPEG") for name in ("blue", "red", "lime")]
    answer = composed({"image": request(*pictures)}, {"top_k": 1})
    assert answer["labels"].tolist() == [[b"blue"], [b"red"], [b"green"]]
    assert np.all(answer["scores"] > 0.9)
    composed.close()


def test_a_wrong_size_is_found_before_anything_starts(store: Store) -> None:
    with pytest.raises(BadConfig, match=r"\$\.stages\[1\]\.inputs: .*axis 2 is 9, expected 8"):
        plan(PipelineConfig("p", stages(9)), store)
