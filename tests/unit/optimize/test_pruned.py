"""Pruning in a search: fewer channels, judged by the guard, kept by rounds; what cannot be pruned is refused."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

from tests.unit.optimize import digits
from tests.unit.optimize.test_choose import trial
from torchship import process
from torchship.errors import BadConfig, TorchshipError, Unavailable, Unsupported
from torchship.optimize import reference, search, targets, training
from torchship.optimize.capture import capture
from torchship.optimize.channels import Prune, PrunedRound
from torchship.optimize.guard import Guard, judge
from torchship.optimize.report import Report
from torchship.optimize.strategies import pruned
from torchship.optimize.trial import Trial
from torchship.recipe import PRUNE, Recipe, Step

PLAIN, CUT = Recipe("onnxruntime", {"precision": "fp32"}), (Step(PRUNE, {"cut": 0.5, "round": 1}),)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pruned")


@pytest.fixture(scope="module")
def found(folder: Path) -> Report:
    """A search that was killed after its first round, and started again."""
    outcome = process.run("tests.unit.optimize.digits:search_until_round", argument=str(folder), timeout=200)
    assert outcome.fault == "killed by SIGKILL", outcome.log
    (first,) = (folder / "cache" / "pruned").glob("*/round-*.json")
    before = first.read_bytes()
    report = digits.optimize(folder)
    assert first.read_bytes() == before, "what was done is not done again"
    return report


def of_rounds(report: Report) -> list[Trial]:
    return [trial for trial in report.trials if trial.recipe.weights]


def test_after_a_kill_it_goes_on_and_ends_with_fewer_channels(found: Report) -> None:
    one, two = found.facts.pruned
    assert (one.number, two.number) == (1, 2)
    assert two.flops <= one.flops * 0.75
    assert two.flops <= two.whole / 2
    assert two.whole == 32 * 9 * 64 + 64 * 9 * 32 * 64 + 2560
    assert two.rows > 500
    assert 1 <= two.epochs <= 6
    assert all(left % 8 == 0 and left < had for left, had in two.widths.values())
    assert two.widths["3"][1] == 64


def test_pruned_candidates_are_judged_against_the_original_and_may_win(found: Report) -> None:
    tried = of_rounds(found)
    assert {trial.recipe.weights for trial in tried} == {"prune1", "prune2"}
    for one in tried:
        assert one.verdict is not None
        assert one.verdict.evidence is not None
        assert one.verdict.evidence.rows > 500
        assert one.verdict.evidence.measure == "top-1"
        assert "of the multiplications gone" in one.notes[0]
    assert found.winner in tried, "it is the smallest"
    assert found.artifact is not None
    assert found.artifact.manifest.recipe == found.winner.recipe
    html = (found.artifact.path / "report" / "report.html").read_text()
    assert "<h2>Pruning</h2>" in html
    assert f"3: {found.facts.pruned[-1].widths['3'][0]} of 64" in html


def test_weights_and_channel_map_make_the_same_module_of_a_fresh_one(found: Report) -> None:
    made = {trial.recipe.weights: trial for trial in of_rounds(found)}
    record = found.facts.pruned[1]
    net = pruned.restored(digits.network(), record).eval()
    again = msgspec.json.decode(Path(record.weights).with_suffix(".json").read_bytes(), type=PrunedRound)
    assert again == record
    x, y = digits.pictures()
    with torch.no_grad():
        assert float((net(x[1000:]).argmax(1) == y[1000:]).float().mean()) > 0.8
    assert made["prune2"].status == "ok"
    fp32 = next(t for t in of_rounds(found) if t.recipe.options.get("precision") == "fp32")
    round_of = found.facts.pruned[int(str(fp32.recipe.transforms[0].options["round"])) - 1]
    from torchship.artifact import open_artifact

    net = pruned.restored(digits.network(), round_of).eval()
    stage = open_artifact(fp32.artifact).open()
    with torch.no_grad():
        wanted = net(x[:2]).numpy()
    np.testing.assert_allclose(stage({"input": x[:2].numpy()})["output"], wanted, atol=1e-4)
    stage.close()


def test_a_second_run_comes_from_the_cache(found: Report, folder: Path) -> None:
    again = digits.optimize(folder)
    assert again.facts.pruned == found.facts.pruned
    assert [trial.recipe for trial in again.trials] == [trial.recipe for trial in found.trials]
    assert all(trial.cached for trial in of_rounds(again))
    assert again.version == found.version


def ruin(student: nn.Module, teacher: nn.Module, rows: Sequence[tuple[Any, Any, Any]]) -> None:
    """Somebody's training that makes it worse."""
    (x,), named, labels = rows[0]
    assert student.training
    assert not teacher.training
    assert not named
    assert teacher(x).shape == student(x).shape == (len(labels), 10)
    with torch.no_grad():
        for weight in student.parameters():
            weight.mul_(0.3).add_(0.05)


def test_what_the_guard_refuses_never_wins(folder: Path, found: Report) -> None:
    report = digits.optimize(folder, train=ruin, publish=False)
    tried = of_rounds(report)
    assert tried
    assert {trial.status for trial in tried} == {"refused"}
    assert {trial.recipe.weights for trial in tried} == {"prune1"}, "more pruning would only lose more"
    assert report.winner is not None
    assert not report.winner.recipe.weights
    assert any(note.startswith("pruning ended after round 1: ") for note in report.facts.notes)
    assert report.facts.pruned[0].loss is None


def fails(student: nn.Module, teacher: nn.Module, rows: Sequence[tuple[Any, Any, Any]]) -> None:
    """Somebody's training with a fault."""
    raise ValueError("no card")


def test_a_training_that_fails_costs_a_note(folder: Path, found: Report) -> None:
    report = digits.optimize(folder, train=fails, publish=False)
    assert not of_rounds(report)
    assert report.winner is not None
    (note,) = (note for note in report.facts.notes if note.startswith("pruning"))
    assert "round 1 of 2: the training function failed: ValueError: no card" in note


class Shuffled(nn.Module):
    """Channels change places between two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 16, 1), nn.Conv2d(16, 10, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, 10, h, w]."""
        n, _, h, w = x.shape
        y = self.one(x).view(n, 2, 8, h, w).transpose(1, 2).reshape(n, 16, h, w)
        return self.two(y)  # type: ignore[no-any-return]


def test_what_cannot_be_pruned_is_refused_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(kind: type[TorchshipError], module: nn.Module, **more: Any) -> str:
        tried: list[Trial] = []
        given: dict[str, Any] = {"prune": 0.5, "calibration": list(digits.pairs()), **more}
        with pytest.raises(kind) as caught:
            search.optimize(
                module, digits.pictures()[0][:2], cache=tmp_path, on_trial=lambda t, *_: tried.append(t), **given
            )
        assert not tried
        return f"{caught.value} {caught.value.hint}"

    net = digits.trained()
    assert "no data add --data" in refused(BadConfig, net, calibration=None)
    assert "0 rows of the data are left to train on" in refused(
        BadConfig, net, calibration=[digits.pictures()[0][:900]]
    )
    assert "keep" in refused(Unsupported, Shuffled())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of newer torch
        warnings.simplefilter("ignore", DeprecationWarning)
        script = torch.jit.trace(net, digits.pictures()[0][:2])
        assert "TorchScript" in refused(Unsupported, script)
    assert "share between 0 and 1" in refused(BadConfig, net, prune=1.5)
    assert "--prune" in refused(BadConfig, net, prune=None, train=ruin)
    monkeypatch.setattr(pruned, "missing", lambda *_, **__: "torch_pruning is not installed: pip install it")
    assert "torch_pruning is not installed" in refused(Unavailable, net)


def test_rows_of_the_guard_are_never_trained_on() -> None:
    x, y = digits.pictures()
    samples: list[Any] = [(x[start : start + 100], y[start : start + 100]) for start in range(0, 1700, 100)]
    samples.append((x[1000:1050], y[1000:1050]))  # some of the guard's again
    model, held, groups = reference.split(capture(digits.trained(), x[:2]), samples)
    rows = training.training_rows(samples, model=model, held_back=held, groups=groups)
    judged = {row.tobytes() for batch in held for row in batch["input"]}
    learnt = [row.tobytes() for batch, _ in rows for row in batch["input"]]
    assert judged
    assert judged.isdisjoint(learnt)
    assert len(set(learnt)) + len(judged) >= 1690
    batch, labels = rows[0]
    assert labels is not None
    assert labels.tolist() == y[: len(labels)].tolist()
    assert len(labels) == len(batch["input"])


def test_rows_of_the_guards_groups_are_not_trained_on_either() -> None:
    x, y = digits.pictures()
    samples = [
        {
            "input": x[at : at + 50].numpy(),
            "labels": y[at : at + 50].numpy(),
            "group": [row // 10 for row in range(at, at + 50)],
        }
        for at in range(0, 1750, 50)
    ]
    model, held, groups = reference.split(capture(digits.trained(), x[:2]), samples)
    rows = training.training_rows(samples, model=model, held_back=held, groups=groups)
    where = {x[row].numpy().tobytes(): row // 10 for row in range(1750)}
    judged = {where[row.tobytes()] for batch in held for row in batch["input"]}
    learnt = {where[row.tobytes()] for batch, _ in rows for row in batch["input"]}
    assert learnt
    assert judged.isdisjoint(learnt)
    assert all(labels is not None for _, labels in rows)


def record(flops: float) -> PrunedRound:
    return PrunedRound(1, flops, 1.0, 1.0, {}, {}, "", "")


def test_a_round_goes_as_far_as_what_was_measured_says() -> None:
    end = pruned._end
    slow, near, far = (trial("a", p50=ms) for ms in (4.0, 2.2, 40.0))
    by_share, by_time = Prune(0.75, rounds=2), Prune(0.9, rounds=8, latency=2.0)
    assert end([], by_share, slow) == pytest.approx(0.5)
    assert end([record(0.5)], by_share, slow) == pytest.approx(0.25)
    assert end([], by_time, slow) == pytest.approx(0.6)
    assert end([record(0.6)], by_time, near) == pytest.approx(0.54)
    assert end([], by_time, far) == pytest.approx(0.6), "not too much at once"
    assert end([record(0.12)], by_time, far) == pytest.approx(0.1)
    assert pruned._fast_enough(trial("a", p50=1.9), by_time)
    assert not pruned._fast_enough(near, by_time)
    assert not pruned._fast_enough(near, by_share)


def test_the_words_of_the_command_line() -> None:
    assert targets.prune_at("0.5") == Prune(0.5, importance="taylor")
    assert targets.prune_at("2ms") == Prune(0.9, rounds=8, importance="taylor", latency=2.0)
    assert targets.prune_at("0.7,0.5s") == Prune(0.7, rounds=8, importance="taylor", latency=500.0)
    for text in ("much", "0.5,0.6", "1ms,2ms", "", "1.2"):
        with pytest.raises(BadConfig):
            targets.prune_at(text)


def test_the_guard_forgives_a_pruned_one_made_up_rows_and_nothing_else() -> None:
    verdict = trial("a").verdict
    assert verdict is not None
    from torchship.artifact.manifest import Evidence

    def passed(steps: tuple[Step, ...], **evidence: Any) -> bool:
        found = msgspec.structs.replace(verdict, evidence=Evidence(measure="top-1", output="y", rows=100, **evidence))
        return judge(found, guard=Guard(), recipe=msgspec.structs.replace(PLAIN, transforms=steps)).passed

    assert passed(CUT, made=0.9, drift=0.2)
    assert not passed((), made=0.9)
    assert not passed((), drift=0.2)
    assert not passed(CUT, cost=0.02)
    assert not passed(CUT, broken="a law")
    assert not passed(CUT, value_drift=0.4)
