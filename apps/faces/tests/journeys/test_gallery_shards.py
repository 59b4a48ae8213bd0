"""Journey: a gallery in two shards on servers of their own; one is killed, says so, comes back, and nobody is lost."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.journeys.test_server_process import Running, serving

from torchship_faces.gallery import Enrolment, Gallery

VECTORS = np.eye(8, dtype=np.float32)
SHARD = """
[[model]]
name = "match"
run = "torchship_faces.gallery:Match"
options = {{gallery = "{gallery}", model = "m", width = 8}}
[[model]]
name = "enrol"
run = "torchship_faces.gallery:Enrol"
options = {{gallery = "{gallery}", model = "m", width = 8}}
"""
FAR = """{{remote = "{url}/match", name = "shard{n}", inputs = {{embedding = "embedding"}},
  signature = "embedding:FP32[-1,8] -> similarity:FP32[-1], nearest:BYTES[-1]", parameters = {{top = 1, group = ""}},
  options = {{timeout = 5.0, attempts = 2, breaker_pause = 0.1}},
  outputs = {{similarity = "similarity_{n}", nearest = "nearest_{n}"}}}}"""
FRONT = """
[[model]]
name = "who"
stages = [
  {shards},
  {{run = "torchship_faces.gallery:Merge", options = {{shards = 2}}, parameters = {{threshold = 0.5}}}},
]
"""


def who(front: Running, *rows: int, **parameters: Any) -> tuple[int, Any]:
    vectors = VECTORS[list(rows)]
    given = {"name": "embedding", "shape": list(vectors.shape), "datatype": "FP32", "data": vectors.ravel().tolist()}
    body = {"inputs": [given], "parameters": parameters, "outputs": [{"name": "person"}]}
    code, answer = front.ask("/v2/models/who/infer", body)
    return code, answer["outputs"][0]["data"] if code == 200 else answer["error"]


@pytest.mark.timeout(180)
def test_a_shard_dies_and_comes_back(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two", "front")]
    for folder in folders:
        folder.mkdir()
    texts = [SHARD.format(gallery=folder / "gallery") for folder in folders[:2]]
    with serving(texts[0], folders[0]) as one, serving(texts[1], folders[1]) as two:
        urls = [server.url.replace("http", "grpc") for server in (one, two)]
        shards = ",\n  ".join(FAR.format(url=url, n=n).replace("\n", "") for n, url in enumerate(urls))
        for number, shard in enumerate((one, two, one, two)):  # ann and cid are in one, bob and dan in two
            inputs = [
                {"name": "person", "shape": [1], "datatype": "BYTES", "data": [["ann", "bob", "cid", "dan"][number]]},
                {"name": "embedding", "shape": [1, 8], "datatype": "FP32", "data": VECTORS[number].tolist()},
            ]
            body = {"inputs": inputs, "parameters": {"groups": "women"} if not number else {}}
            code, answer = shard.ask("/v2/models/enrol/infer", body)
            assert code == 200, answer
        with serving(FRONT.format(shards=shards), folders[2]) as front:
            assert who(front, 0, 1, 2, 3, 4) == (200, ["ann", "bob", "cid", "dan", ""])
            assert who(front, 0, 1, group="women") == (200, ["ann", ""]), "parameters reach the shards"
            two.child.kill()
            two.finish()
            code, words = who(front, 0)
            port = urls[1].rpartition(":")[2]
            assert (code, port in words, "shard1" in words) == (503, True, True), words
            # what the dead one had acknowledged is on the disk; another process adds to it meanwhile
            gallery = Gallery(folders[1] / "gallery", model="m", width=8)
            gallery.enrol([Enrolment(person="eve", vectors=VECTORS[4:5])])
            gallery.close()
            with serving(texts[1], folders[1], "--http-port", port) as again:
                assert re.search(rf":{port}$", again.url)
                deadline = time.monotonic() + 60
                while who(front, 4)[0] != 200 and time.monotonic() < deadline:
                    time.sleep(0.1)
                assert who(front, 0, 1, 2, 3, 4) == (200, ["ann", "bob", "cid", "dan", "eve"])
