"""A worker's specification: sent as it is, and measured the same on both sides."""

from __future__ import annotations

import msgspec
import pytest

from torchship.pipeline.config import StageConfig
from torchship.serve.config import ModelConfig, convert
from torchship.serve.engine.spec import LineLimits, Placement, StageModel, WorkerSpec, placements
from torchship.tensors import Signature


def model(signature: str, *, batched: bool = True, most: int = 8) -> StageModel:
    found = Signature.parse(signature, batched=batched)
    return StageModel(name="m", config=StageConfig(run="a:b"), store="/s", signature=found, max_batch=most)


def test_it_arrives_as_it_was_sent() -> None:
    spec = WorkerSpec(
        model=model("x:FP32[-1,4], ids:INT64[-1,seq:1..512] -> y:FP32[-1]"),
        placement=Placement(device="cuda:1", memory_share=0.5, threads=3, cpus=(0, 2), nice=4),
        limits=LineLimits(timeout=7.0, cpus=(0, 2)),
    )
    assert msgspec.json.decode(msgspec.json.encode(spec), type=WorkerSpec) == spec


@pytest.mark.parametrize(
    ("signature", "batched", "fits", "sizes"),
    [
        ("x:FP32[-1,4] -> y:FP32[-1]", True, True, (128, 64)),
        ("x:FP32[-1,4] -> y:FP32[-1,n]", True, True, (128, 2**20)),
        ("x:FP32[-1,n] -> y:FP32[-1]", True, False, (2**20, 64)),
        ("x:BYTES[-1] -> y:FP32[-1]", True, False, (2**20, 64)),
        ("x:FP32[100] -> y:FP32[1]", False, False, (448, 64)),
        ("x:FP32[-1,3,4096,4096] -> y:FP32[-1]", True, False, (2**28, 64)),
    ],
)
def test_slots(signature: str, batched: bool, fits: bool, sizes: tuple[int, int]) -> None:
    found = model(signature, batched=batched)
    assert (found.fits, found.slot_sizes) == (fits, sizes)


def test_a_setting_of_a_line_is_a_key_of_the_file() -> None:
    keys = {field.name for field in msgspec.structs.fields(LineLimits)}
    assert keys <= {field.name for field in msgspec.structs.fields(ModelConfig)}
    given = {"name": "m", "run": "a:b", "queue_rows": 5, "nice": 3, "cpus": [1], "nan": "refuse"}
    (found,) = convert({"model": [given]}).model
    assert found.limits() == LineLimits(queue_rows=5, nice=3, cpus=(1,), nan="refuse")
    assert type(found.limits()) is LineLimits


def test_each_copy_has_its_place() -> None:
    config = StageConfig(artifact="a", copies=3, device=("cuda:0", "cuda:1"), threads=2)
    found = placements(config, LineLimits(nice=1))
    assert [place.device for place in found] == ["cuda:0", "cuda:1", "cuda:0"]
    assert {(place.threads, place.nice) for place in found} == {(2, 1)}
    (python,) = placements(StageConfig(run="a:b"), LineLimits())
    assert python.threads == 1


@pytest.mark.parametrize(
    ("said", "measured", "allowed"), [(0.0, 0.0, 120.0), (0.0, 8.0, 120.0), (0.0, 50.0, 200.0), (7.0, 50.0, 7.0)]
)
def test_how_long_a_stage_may_take_to_open(said: float, measured: float, allowed: float) -> None:
    made = msgspec.structs.replace(model("x:FP32[-1] -> y:FP32[-1]"), load_s=measured)
    assert WorkerSpec(model=made, limits=LineLimits(open_timeout=said)).open_timeout == allowed


@pytest.mark.parametrize(
    ("device", "visible", "seen", "told"),
    [
        ("cpu", None, "cpu", None),
        ("cuda", "2,3", "cuda", None),
        ("GPU", None, "GPU", None),
        ("cuda:x", "2,3", "cuda:x", None),
        ("cuda:1", None, "cuda:0", "1"),
        ("cuda:0", None, "cuda:0", "0"),
        ("cuda:1", "5, 7", "cuda:0", "7"),
        ("cuda:0", "MIG-a,MIG-b", "cuda:0", "MIG-a"),
        ("cuda:2", "5,7", "cuda:2", None),
    ],
)
def test_a_process_sees_its_own_card_only(device: str, visible: str | None, seen: str, told: str | None) -> None:
    place = Placement(device=device, memory_share=0.5)
    found, environment = place.alone({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    assert found == Placement(device=seen, memory_share=0.5)
    assert environment == ({} if told is None else {"CUDA_VISIBLE_DEVICES": told})
