"""Memory as the goal: a whole server is measured, its largest batch is kept, and a limit that nobody meets refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.unit.artifact.made import linear
from torchship import process
from torchship.artifact import Store, open_artifact
from torchship.artifact.manifest import BatchPoint, ServedMemory, Timing
from torchship.errors import BadConfig, Unavailable
from torchship.optimize import footprint
from torchship.optimize.search import thrifty
from torchship.pipeline.config import convert
from torchship.pipeline.planning import plan
from torchship.recipe import Recipe

MB = 10**6
WAIT = "import sys; print(1, flush=True); sys.stdin.read()"
HOLD = f"import mmap; kept = mmap.mmap(-1, 50_000_000); kept.write(b'x' * 50_000_000); {WAIT}"


def test_what_processes_share_counts_once_and_what_they_hold_counts_whole() -> None:
    """A process that holds 50 MB, beside one that does not; both share the interpreter's files with this one."""
    sizes = []
    for code in (HOLD, WAIT):
        child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        sizes.append(process.held(child.pid))
        child.communicate()
    assert 49 * MB < sizes[0] - sizes[1] < 53 * MB
    assert sizes[1] > 5 * MB  # its libraries count, though others have them too
    assert process.held(child.pid) == 0


def test_a_whole_server_is_measured(tmp_path: Path) -> None:
    made = linear(tmp_path / "linear")
    found = footprint.fitted(made.path, limit=None, threads=1, one_process=True, timeout=120)
    assert found.max_batch in (1, 2, 4, 8)
    assert 20 * MB < found.peak < 300 * MB
    apart = footprint.served(made.path, most=1, threads=1, one_process=False, timeout=120)
    assert apart > found.peak + 10 * MB  # an interpreter more


def test_a_server_that_does_not_start_is_told(tmp_path: Path) -> None:
    made = linear(tmp_path / "linear")
    (made.path / "backend" / "model.onnx").write_bytes(b"nothing")
    with pytest.raises(Unavailable, match="does not start"):
        footprint.served(made.path, most=1, threads=1, one_process=True, timeout=60)


@pytest.mark.parametrize(
    ("peaks", "limit", "batch"),
    [
        ({1: 60, 2: 62, 4: 70, 8: 90}, 75 * MB, 4),
        ({1: 60, 2: 62, 4: 70, 8: 90}, 100 * MB, 8),
        ({1: 60}, 50 * MB, 1),  # nobody tries more where one row is too much
        ({1: 60, 2: 61, 4: 70}, None, 2),
    ],
)
def test_the_largest_batch_within_the_limit(
    peaks: dict[int, int], limit: int | None, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(footprint, "served", lambda folder, *, most, **_: peaks[most] * MB)
    made = linear(tmp_path / "linear")
    found = footprint.fitted(made.path, limit=limit, threads=1, one_process=True, timeout=60)
    assert found == ServedMemory(peak=peaks[batch] * MB, max_batch=batch, one_process=True)


def timing(peak: int) -> Timing:
    curve = (BatchPoint(1, 1.0, 1.0, 1.0, 1000.0), BatchPoint(4, 1.0, 1.0, 1.0, 4000.0))
    served = ServedMemory(peak=peak, max_batch=2, one_process=True)
    return Timing(curve, 0.1, peak, 10, 1, served)


def test_the_server_keeps_to_the_batch_that_was_measured(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    made = linear(tmp_path / "linear", timing=timing(90 * MB), max_batch=2)
    store.publish(made.path, name="linear")
    assert open_artifact(store.resolve("linear")).manifest.timing == timing(90 * MB)
    stage: dict[str, Any] = {"artifact": "linear"}
    assert plan(convert({"name": "m", "stages": [stage]}), store).max_batch == 2
    with pytest.raises(BadConfig, match=r"max_batch 4 is more than the 2 .* took 90\.0 MB"):
        plan(convert({"name": "m", "stages": [{**stage, "max_batch": 4}]}), store)


def test_older_artifacts_and_readers_know_nothing_of_it() -> None:
    plain = msgspec.structs.replace(timing(1), served=None)
    assert "served" not in msgspec.json.decode(msgspec.json.encode(plain))


def test_backends_state_what_saves_memory_and_the_caller_wins() -> None:
    assert thrifty(Recipe("onnxruntime", {"precision": "int8"})).options == {"precision": "int8", "arena": False}
    assert thrifty(Recipe("onnxruntime", {"arena": True})).options == {"arena": True}
    assert thrifty(Recipe("eager")) == Recipe("eager")
