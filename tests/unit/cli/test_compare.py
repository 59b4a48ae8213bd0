"""`torchship compare`: two artifacts, one artifact on two machines, two reports, and what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.unit.artifact.made import colour, linear
from tests.unit.cli.test_artifact_commands import torchship
from torchship.artifact.manifest import BatchPoint, Timing, Verdict
from torchship.errors import BadConfig, NotFound
from torchship.optimize.choose import Choice, Constraints
from torchship.optimize.facts import Facts
from torchship.optimize.trial import Trial
from torchship.recipe import Recipe


def timing(ms: float, *, size: int = 2_000_000) -> Timing:
    curve = tuple(BatchPoint(n, ms * n, ms * n * 1.1, ms * n * 1.2, 1000 / ms) for n in (1, 2, 4))
    return Timing(curve, load_s=0.5, peak_memory=80_000_000, file_size=size, threads=2)


def rows(*words: object) -> dict[str, Any]:
    found = json.loads(torchship("compare", *map(str, words), "--json").output)
    return {row["what"]: row for row in found["rows"]}


def test_two_artifacts_side_by_side(tmp_path: Path) -> None:
    linear(tmp_path / "a", timing=timing(4.0), verdict=Verdict(True, 0.01, 0.99, top1=0.5))
    linear(tmp_path / "b", timing=timing(1.0, size=500_000), verdict=Verdict(True, 0.02, 0.98, top1=0.25))
    found = rows(tmp_path / "a", tmp_path / "b")
    assert found["batch 1 p50, ms"] == {"what": "batch 1 p50, ms", "a": "4.000", "b": "1.000", "better": 4.0}
    assert found["best rows/s"]["better"] == 4.0
    assert found["file size, MB"]["better"] == 4.0
    assert found["signature"]["b"] == "the same"
    assert (found["top-1 agreement"]["a"], found["top-1 agreement"]["b"]) == ("50.00%", "25.00%")
    text = torchship("compare", tmp_path / "b", tmp_path / "a").output
    assert "0.25x" in text
    assert "B is better" in text


def test_measured_now_with_the_outputs_apart(tmp_path: Path) -> None:
    linear(tmp_path / "a")
    linear(tmp_path / "b")
    found = rows(tmp_path / "a", tmp_path / "b", "--measure", "--threads", 1)
    assert found["B's outputs against A's"]["b"].startswith("error 0, cosine 1.0")
    assert float(found["batch 1 p50, ms"]["a"]) > 0
    colour(tmp_path / "c")
    with pytest.raises(BadConfig, match="different signatures"):
        rows(tmp_path / "a", tmp_path / "c", "--measure")


def report(path: Path, *, hardware: str, eager: float, fast: float | None) -> None:
    second = (
        Trial(Recipe("openvino"), "failed", failure="build: openvino is not installed")
        if fast is None
        else Trial(Recipe("openvino"), "ok", timing=timing(fast))
    )
    trials = (Trial(Recipe("eager"), "ok", timing=timing(eager)), second)
    winner = 0 if fast is None else 1
    facts = Facts(
        name="net", created="2026", torchship="0", source="", signature="x:FP32[-1,3] -> y:FP32[-1,2]",
        hardware=hardware, fingerprint=hardware, threads=2, device="cpu", goal="latency", constraints=Constraints(),
        trials=trials, choice=Choice(winner=winner, ranking=(winner,), reason=""),
    )  # fmt: skip
    path.write_bytes(msgspec.json.encode(facts))


def test_the_reports_of_two_machines(tmp_path: Path) -> None:
    report(tmp_path / "here.json", hardware="EPYC", eager=8.0, fast=2.0)
    report(tmp_path / "pi.json", hardware="Cortex-A72", eager=80.0, fast=None)
    found = rows(tmp_path / "here.json", tmp_path / "pi.json")
    assert (found["machine"]["a"], found["machine"]["b"]) == ("EPYC", "Cortex-A72")
    assert (found["winner"]["a"], found["winner"]["b"]) == ("openvino", "eager")
    assert found["eager, batch 1 p50, ms"]["better"] == pytest.approx(0.1)
    assert found["openvino, batch 1 p50, ms"]["b"] == "failed: build: openvino is not installed"


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    linear(tmp_path / "a")
    report(tmp_path / "report.json", hardware="EPYC", eager=8.0, fast=2.0)
    (tmp_path / "odd.json").write_text("{}")
    with pytest.raises(BadConfig, match="two report"):
        raise_hint(tmp_path / "a", tmp_path / "report.json")
    with pytest.raises(BadConfig, match=r"odd\.json is neither a manifest nor a report"):
        rows(tmp_path / "odd.json", tmp_path / "report.json")
    with pytest.raises(NotFound, match="No such file"):
        rows(tmp_path / "gone.json", tmp_path / "report.json")
    with pytest.raises(BadConfig, match="needs artifacts"):
        rows(tmp_path / "report.json", tmp_path / "report.json", "--measure")


def raise_hint(*words: object) -> None:
    try:
        rows(*words)
    except BadConfig as fault:
        raise BadConfig(fault.line) from None


def test_an_artifact_brings_its_own_report(tmp_path: Path) -> None:
    linear(tmp_path / "made")
    report(tmp_path / "pi.json", hardware="Cortex-A72", eager=80.0, fast=20.0)
    with pytest.raises(BadConfig, match="holds none"):
        rows(tmp_path / "made", tmp_path / "pi.json")
    (tmp_path / "made" / "report").mkdir()
    report(tmp_path / "made" / "report" / "report.json", hardware="EPYC", eager=8.0, fast=2.0)
    found = rows(tmp_path / "made", tmp_path / "pi.json")
    assert (found["machine"]["a"], found["machine"]["b"]) == ("EPYC", "Cortex-A72")
    assert found["winner, batch 1 p50, ms"]["better"] == pytest.approx(0.1)
