"""What a caller who loads a model may change, and what the rate of a line says about waiting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvloop

from tests.serving import HERE
from torchship.artifact import Store
from torchship.errors import BadInput, Denied, NotFound, Unauthenticated
from torchship.serve.access import gate, new_token
from torchship.serve.catalog import Catalog
from torchship.serve.config import ModelConfig, Token
from torchship.serve.describe import check_parameters, overridden
from torchship.serve.metrics import LineMeter
from torchship.serve.service import Service
from torchship.wire.messages import Request, WantedOutput
from torchship.wire.oip_json import encode_response

TOLD = {"name": "m", "max_batch_size": 8, "platform": "torchship", "instance_group": [{"name": "a", "count": 1}]}


def test_what_may_be_changed() -> None:
    config = ModelConfig(name="m", run="a:b")
    assert overridden(config, json.dumps(TOLD), told=TOLD) == config  # what comes back unchanged is no change
    changed = {**TOLD, "max_batch_size": "16", "instance_group": [{"count": 2}]}
    changed["dynamic_batching"] = {"max_queue_delay_microseconds": 2000}
    found = overridden(config, json.dumps(changed), told=TOLD)
    assert (found.max_batch, found.copies, found.max_wait) == (16, 2, 0.002)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (5, "expected a string"),
        ("[", "config"),
        ("[" * 100_000, "config"),
        ('{"max_batch_size": 0}', "out of bounds"),
        ('{"max_batch_size": "many"}', "config"),
        ('{"max_batch_size": 1000000}', "out of bounds"),
        ('{"instance_group": [{"count": 100000}]}', "out of bounds"),
        ('{"dynamic_batching": {"max_queue_delay_microseconds": 99000000}}', "out of bounds"),
        ('{"platform": "onnxruntime"}', "'platform' cannot be changed"),
    ],
)
def test_what_may_not(text: Any, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        overridden(ModelConfig(name="m", run="a:b"), text, told=TOLD)


def test_files_are_not_taken() -> None:
    with pytest.raises(BadInput, match="Invalid file path"):
        check_parameters({"file:1/model.onnx": "AA=="})
    with pytest.raises(BadInput, match="unknown parameter"):
        check_parameters({"x": 1})


def test_how_long_a_full_line_takes() -> None:
    meter = LineMeter()
    assert meter.seconds_for(100, 0.0) == 1.0  # nothing is known yet
    meter.mark(0.0)
    meter.succeeded([50], [0.1], 0.1)
    assert meter.seconds_for(100, 2.0) == 4.0  # 25 rows a second
    assert meter.seconds_for(10_000, 2.0) == 60.0
    idle = LineMeter()
    idle.mark(0.0)
    assert idle.seconds_for(100, 3.0) == 3.0  # nothing came out for three seconds


def test_missing_tokens_and_missing_scopes() -> None:
    token, stored = new_token()
    admit = gate([Token("shop", stored)])
    assert admit is not None
    admit("infer", {"authorization": f"bearer {token}"})
    for headers in ({}, {"authorization": "Bearer x"}, {"authorization": f"Basic {token}"}):
        with pytest.raises(Unauthenticated):
            admit("infer", headers)
    with pytest.raises(Denied, match="does not allow 'manage'") as caught:
        admit("manage", {"authorization": f"Bearer {token}"})
    assert not isinstance(caught.value, Unauthenticated)


def test_classes_have_names_and_parameters_whole_bounds(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("cat\ndog\nhare\n")
    stages = {"m": "double", "s": "sums"}
    models = {
        name: ModelConfig(name=name, run=f"{HERE}:{run}", labels=str(tmp_path / "names.txt"))
        for name, run in stages.items()
    }

    async def work() -> None:
        catalog = Catalog(store=Store(tmp_path))
        try:
            for model in models.values():
                await catalog.load(model)
            service = Service(catalog, control=True)
            request = Request("m", {"x": np.array([[1, 4, 3, 2]], np.float32)})
            request.outputs = (WantedOutput("y", classification=2),)
            body = json.loads(encode_response(await service.submit(request), request).data)
            assert body["outputs"][0]["data"] == ["8.000000:1:dog", "6.000000:2:hare"]
            about = service.model_metadata("s")["parameters"]["offset"]
            assert json.dumps(about) == '{"default": 0, "minimum": 0, "maximum": 9}'
            with pytest.raises(NotFound, match="failed to load 'none'"):
                await service.repository_load("none", {})
            await service.repository_load("m", {"config": '{"max_batch_size": 3}'})
            assert service.model_config("m")["max_batch_size"] == 3
            await service.repository_load("m", {})
            assert service.model_config("m")["max_batch_size"] == 8
        finally:
            await catalog.close()

    uvloop.run(work())
