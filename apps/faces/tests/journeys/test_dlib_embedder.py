"""Journey: dlib's embedder behind the same interface: its numbers, its chips, its thresholds, a gallery of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from torchship.errors import Denied
from torchship_faces import recipes
from torchship_faces.embedders import embedder
from torchship_faces.gallery.gallery import Gallery

# In a process of its own, for it needs torch. `vector` is what the network gives before it is made one long.
CODE = """
import numpy as np, torch
from apps.faces.tests import face_kit
from torchship_faces.prepare import EmbedderNet
from torchship.pipeline import Composed, plan
from torchship.pipeline.config import convert
from torchship_faces import recipes
from torchship_faces.embedders import embedder
known = embedder("dlib")
network = EmbedderNet(known).eval()
store = face_kit.store()
stages = recipes.embed(model=known)["stages"][:-1]
found = Composed(plan(convert({"name": "chips", "stages": stages}), store), store)
raw, unit = {}, {}
for name in ("obama", "obama2", "obama3", "biden"):
    chip = found({"image": np.array([face_kit.picture(name)], object)})["chip"]
    assert chip.shape == (1, 150, 150, 3), chip.shape
    with torch.inference_mode():
        raw[name] = network.net(torch.from_numpy(chip).permute(0, 3, 1, 2).float())[0].numpy()
        unit[name] = network(torch.from_numpy(chip))["embedding"][0].numpy()
found.close()
for one in raw:
    for other in raw:
        same = one[:5] == other[:5]
        distance, cosine = np.linalg.norm(raw[one] - raw[other]), float(unit[one] @ unit[other])
        assert (distance < 0.6) == same == (cosine > known.threshold), (one, other, distance, cosine)
"""


@pytest.mark.timeout(200)
def test_persons_are_told_apart_by_dlibs_own_distance() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_gallery_knows_its_embedder(tmp_path: Path) -> None:
    dlib = embedder("dlib")
    Gallery(tmp_path, model=dlib.space, width=dlib.width).close()
    assert embedder(gallery=tmp_path) is dlib
    assert embedder(gallery=tmp_path / "new").name == "fr_feature"
    with pytest.raises(Denied, match="fr_feature"):
        Gallery(tmp_path, model=embedder().space)
    stages = recipes.identify(str(tmp_path), model=dlib)["stages"]
    assert [stage.get("artifact", "") for stage in stages][4] == "face-embedder-dlib"
    Gallery(tmp_path / "other", model="someone's").close()
    with pytest.raises(Denied, match="no embedder here"):
        embedder(gallery=tmp_path / "other")
