"""The search end to end on a linear layer: bad backends cost one row each, reruns come from the cache."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

import torchship
from tests.unit.optimize.planted import plant
from torchship import hardware
from torchship.artifact import open_artifact
from torchship.errors import BadConfig, BadInput, CaptureFailed, Unavailable
from torchship.optimize import config, facts, reference, search, workspace
from torchship.optimize.cache import hash_model
from torchship.optimize.capture import capture
from torchship.optimize.guard import Guard
from torchship.optimize.measure import Effort
from torchship.optimize.report import Report
from torchship.optimize.trial import Trial, read_metric

QUICK = Effort(seconds=0.02, calls=5, fewest=2, warm_up=0.01, max_batch=4)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One cache for all tests here: the eager trial is the slowest, and the same each time."""
    folder = tmp_path_factory.mktemp("search")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(plant(folder / "site")))
        patch.syspath_prepend(str(Path(__file__).parents[3]))
        yield folder


def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def optimize(folder: Path, *names: str, **more: Any) -> Report:
    settings: dict[str, Any] = {"effort": QUICK, "cache": folder / "cache", "store": folder / "store", **more}
    backends = [f"planted_{name}" for name in names]
    return search.optimize(module(), torch.randn(2, 4, generator=torch.manual_seed(1)), backends=backends, **settings)


def failure(report: Report, name: str) -> str:
    return next(trial.failure for trial in report.trials if trial.recipe.backend == f"planted_{name}")


def test_the_winner_is_published_with_all_that_was_measured(planted: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = optimize(planted, "good", name="line", on_trial=lambda trial, done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]
    assert report.winner is not None
    assert [trial.status for trial in report.trials] == ["ok", "ok"]
    assert report.artifact is not None
    artifact = open_artifact(report.artifact.path)  # every file is hashed again
    assert artifact.manifest.name == "line"
    assert artifact.manifest.timing == report.winner.timing
    assert artifact.manifest.verdict is not None
    assert artifact.manifest.verdict.passed
    assert "Best so far" in (artifact.path / "report" / "report.html").read_text()
    (table,) = (planted / "cache" / "winners").iterdir()
    assert json.loads(table.read_bytes())["won"] == {report.winner.recipe.label: 1}
    stage = artifact.open()
    answers = stage(artifact.inputs())
    np.testing.assert_allclose(answers["output"], artifact.outputs()["output"], rtol=1e-5)
    stage.close()
    assert not list((planted / "cache" / "work").iterdir()), "the workspace is gone"


def test_a_rerun_comes_from_the_cache(planted: Path) -> None:
    first = optimize(planted, "good", "wrong")
    again = optimize(planted, "good", "wrong")
    assert [trial.cached for trial in again.trials] == [True] * 3
    assert [trial.verdict for trial in again.trials] == [trial.verdict for trial in first.trials]
    assert again.version == first.version, "an equal artifact is not published twice"


def test_the_models_hash_sees_weights_structure_and_attributes() -> None:
    def hash_of(made: nn.Module) -> str:
        return hash_model(capture(made, torch.zeros(2, 4)))

    first = hash_of(module())
    assert hash_of(module()) == first
    changed = module()
    with torch.no_grad():
        changed.weight[0, 0] += 1.0  # type: ignore[index,operator]
    assert hash_of(changed) != first
    assert hash_of(nn.Sequential(module(), nn.Dropout(0.1))) != hash_of(nn.Sequential(module(), nn.Dropout(0.2)))


def test_the_first_has_two_points_until_it_is_known_what_else_there_is(planted: Path) -> None:
    effort = msgspec.structs.replace(QUICK, max_batch=8)
    seen: list[list[int]] = []

    def note(trial: Trial, done: int, total: int) -> None:
        seen.append([point.batch for point in trial.timing.curve] if trial.timing else [])

    report = optimize(planted, "good", publish=False, effort=effort, on_trial=note)
    assert seen[0] == [1, 8]
    assert report.facts.eager is not None
    for trial in (report.facts.eager, report.winner):
        assert trial is not None
        assert trial.timing is not None
        assert [point.batch for point in trial.timing.curve] == [1, 2, 4, 8]
    again = optimize(planted, "good", publish=False, effort=effort)
    assert [len(trial.timing.curve) for trial in again.trials if trial.timing] == [4, 4]


def test_new_limits_judge_cached_numbers_anew(planted: Path) -> None:
    assert optimize(planted, "wrong", publish=False).trials[1].status == "refused"
    loose = optimize(planted, "wrong", publish=False, guard=Guard(error=9, cosine=-2, top1=0))
    assert loose.trials[1].cached
    assert loose.trials[1].status == "ok"


def test_faults_cost_one_row_each(planted: Path) -> None:
    report = optimize(
        planted, "segfault", "refuses", "raises", "nan", "wrong", "crooked", "dies", "leaves", "good", publish=False
    )
    assert failure(report, "segfault") == "killed by SIGSEGV"
    assert failure(report, "dies") == "killed by SIGSEGV"
    assert "operator that it does not know" in failure(report, "refuses")
    assert failure(report, "raises") == "build: KeyError: 'a bug in the backend'"
    assert "NaN or infinity" in failure(report, "nan")
    assert "guard: the worst row has a relative error of 2, above 0.002 for fp32" in failure(report, "wrong")
    assert "has shape [2, 2], the reference [2, 3]" in failure(report, "crooked")
    assert "pip install nothing" in report.facts.left_out["planted_leaves"]
    assert report.winner is not None
    assert report.winner.recipe.backend in ("planted_good", "eager")
    page = report.save(planted / "report").read_text()
    assert "killed by SIGSEGV" in page
    assert "pip install nothing" in page
    assert facts.load(planted / "report" / "report.json") == report.facts


def test_a_hang_and_a_blow_up_are_stopped_by_their_limits(planted: Path) -> None:
    hung = optimize(planted, "hang", publish=False, trial_timeout=8.0)
    assert failure(hung, "hang") == "did not finish within 8 s"
    eaten = optimize(planted, "greedy", publish=False, trial_memory=2 * 2**30)
    assert "more than its limit of 2.00 GiB" in failure(eaten, "greedy")


def test_ctrl_c_and_a_spent_budget_keep_what_is_done(planted: Path) -> None:
    def interrupt(trial: Trial, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    report = optimize(planted, "good", "wrong", "nan", publish=False, on_trial=interrupt)
    assert report.facts.interrupted
    assert [trial.status for trial in report.trials] == ["ok", "ok", "skipped", "skipped"]
    assert report.winner is not None
    spent = optimize(planted, "hang", publish=False, budget=0.0)  # what is known counts at any time, as eager is now
    assert spent.trials[0].cached
    assert [trial.status for trial in spent.trials] == ["ok", "skipped"]
    assert "budget" in spent.trials[1].failure


def test_what_a_killed_search_left_is_swept_and_a_living_one_kept(tmp_path: Path) -> None:
    left = tmp_path / "search-dead"
    left.mkdir()
    (left / "model.pkl").write_bytes(b"weights")
    young = tmp_path / "search-young"
    young.mkdir()
    with workspace.private_folder(tmp_path) as living:
        for folder in (left, living):
            os.utime(folder, (0, 0))
        with workspace.private_folder(tmp_path) as other:
            assert set(tmp_path.iterdir()) == {living, other, young}
    assert list(tmp_path.iterdir()) == [young]


def test_layers_are_left_out_of_int8_until_the_guard_holds(planted: Path) -> None:
    torch.manual_seed(2)
    deep = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    rows = [torch.randn(8, 4) for _ in range(4)]
    report = search.optimize(
        deep, torch.randn(2, 4), calibration=rows, backends=["planted_touchy"], effort=QUICK,
        cache=planted / "cache", publish=False,
    )  # fmt: skip
    excluded = [trial.recipe.options.get("exclude", []) for trial in report.trials[1:]]
    assert [len(paths) for paths in excluded if isinstance(paths, list)] == [0, 1, 2]
    assert [trial.status for trial in report.trials[1:]] == ["refused", "refused", "ok"]
    worst = [path for path, _ in report.facts.sensitivity]
    assert sorted(worst) == ["0", "1", "2", "3"]
    assert excluded[2] == worst[:2]
    assert f"kept in float, as the most sensitive to int8: {worst[0]} (" in report.trials[3].notes[0]
    assert "Sensitivity to int8" in report.save(planted / "touchy").read_text()


def test_fine_tuning_is_the_last_resort(planted: Path) -> None:
    def loop(student: Any, distill: Any) -> None:
        assert distill(student(torch.ones(2, 4)), torch.ones(2, 4)).item() >= 0
        with torch.no_grad():
            student.bias[0] = torch.round(student.bias[0] * 64) / 64

    report = optimize(planted, "stubborn", publish=False, finetune=loop)
    assert [trial.status for trial in report.trials[1:]] == ["refused", "refused", "ok"]
    assert report.trials[-1].recipe.transforms[0].transform == "finetune"
    assert report.trials[-1].recipe.label == "planted_stubborn precision=int8 + finetune"


def test_the_users_metric_refuses(planted: Path) -> None:
    ones = np.ones((2, 4), np.float32)
    wanted = module()(torch.from_numpy(ones)).detach().numpy()

    def metric(stage: torchship.Stage) -> float:
        return float((stage({"input": ones})["output"] * wanted).sum())  # of the eager module: a square, above zero

    report = optimize(planted, "good", "wrong", publish=False, evaluate=metric, max_drop=0.001)
    assert report.trials[1].verdict is not None
    assert report.trials[1].verdict.metric == pytest.approx(report.facts.reference_metric, rel=1e-4)
    assert report.trials[1].status == "ok"
    assert "the metric fell by" in failure(report, "wrong")


def test_what_few_rows_did_not_show_is_refused_on_all(planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_LONG", 0.0)
    data = [torch.randn(16, 4, generator=torch.manual_seed(seed)) for seed in range(8)]
    data[7][3, 0] = 200  # of the 64 rows that are judged one of the last
    seen: list[tuple[str, str]] = []
    report = optimize(
        planted,
        "seldom",
        "good",
        publish=False,
        calibration=data,
        on_trial=lambda trial, done, total: seen.append((trial.recipe.backend, trial.status)),
    )
    again = seen.index(("planted_seldom", "refused"))
    assert seen[1] == ("planted_seldom", "ok")
    assert again > 1
    assert "a row is off by" in failure(report, "seldom")
    assert report.facts.rows == 64
    good = next(trial for trial in report.trials if trial.recipe.backend == "planted_good")
    assert good.verdict is not None
    assert good.verdict.evidence is not None
    assert (good.status, good.verdict.evidence.rows) == ("ok", 64)
    rerun = optimize(planted, "seldom", "good", publish=False, calibration=data)
    assert all(trial.cached for trial in rerun.trials)
    assert rerun.facts.choice.reason == report.facts.choice.reason


def test_nobody_valid_publishes_nothing(planted: Path) -> None:
    report = optimize(planted, "good", max_size=10, store=planted / "nothing")
    assert report.winner is None
    assert report.artifact is None
    assert not (planted / "nothing").exists()
    assert "break a limit; the nearest is" in report.facts.choice.reason


def test_wrong_wishes_are_named_before_anything_runs(planted: Path) -> None:
    with pytest.raises(BadConfig, match="unknown goal 'speed'"):
        optimize(planted, "good", goal="speed")
    with pytest.raises(BadConfig, match="unknown backend 'planted_missing'"):
        optimize(planted, "missing")
    with pytest.raises(BadConfig, match="unknown setting 'colour'"):
        optimize(planted, "good", colour="blue")
    with pytest.raises(BadInput, match="calibration holds no batch"):
        optimize(planted, "good", calibration=iter(()))
    with pytest.raises(BadInput, match="calibration is a int"):
        optimize(planted, "good", calibration=3)
    for budget in ("10m", -1, float("nan")):
        with pytest.raises(BadConfig, match="budget is"):
            optimize(planted, "good", budget=budget)
    with pytest.raises(BadConfig, match=r"max_drop is -0\.1"):
        optimize(planted, "good", max_drop=-0.1)


def test_calibration_may_be_one_tensor_whose_rows_are_samples() -> None:
    assert len(config.batches(torch.ones(3, 4))) == 3
    assert config.batches(None) == []


def test_what_is_no_module_and_examples_without_rows_are_named() -> None:
    with pytest.raises(CaptureFailed, match=r"function, not an nn\.Module") as caught:
        capture(module, torch.ones(2, 4))  # type: ignore[arg-type]
    assert "call" in caught.value.hint
    with pytest.raises(CaptureFailed, match=r"Linear is a class, not an nn\.Module"):
        capture(nn.Linear, torch.ones(2, 4))  # type: ignore[arg-type]
    with pytest.raises(CaptureFailed, match="hold no rows"):
        capture(module(), torch.ones(0, 4))


def test_a_card_that_is_not_there_is_told_before_anything_runs(planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hardware, "here", lambda: hardware.Hardware("x86_64", "a processor", 2, 2**30))
    with pytest.raises(Unavailable, match="no device 'cuda:0' here"):
        optimize(planted, "good", device="cuda:0")


@pytest.mark.parametrize(
    ("given", "words"), [(None, "None"), ("good", "a str"), ({"top": 1}, "a dict"), ([[1], [1, 2]], "a list")]
)
def test_a_metric_that_is_no_number_is_named(given: object, words: str) -> None:
    with pytest.raises(BadInput, match=f"the evaluate function returned {words}"):
        read_metric(given)


def test_the_table_tells_every_trial(planted: Path) -> None:
    report = optimize(planted, "good", "raises", publish=False)
    for width in (80, 140):
        console = Console(width=width, file=io.StringIO(), record=True)
        console.print(report.table())
        text = console.export_text()
        assert max(map(len, text.splitlines())) <= width
        assert ("mem MB" in text) == (width == 140)
        assert "planted_good " in text
        assert "winner" in text
        assert "failed  planted_raises: build: KeyError: 'a bug in the backend'" in text
    assert report.speedup > 0
    assert msgspec.json.decode(msgspec.json.encode(report.facts), type=facts.Facts) == report.facts


def test_memory_as_the_goal_measures_a_whole_server_and_keeps_its_batch(planted: Path) -> None:
    report = optimize(planted, "good", name="small", goal="memory", max_memory=2**33)
    assert report.winner is not None
    assert report.winner.timing is not None
    assert report.artifact is not None
    served = report.winner.timing.served
    assert served is not None
    assert served.one_process
    assert report.winner.timing.peak_memory == served.peak
    assert open_artifact(report.artifact.path).manifest.timing == report.winner.timing
    assert report.artifact.manifest.max_batch == served.max_batch


def test_a_memory_limit_that_nobody_meets_refuses_with_what_was_measured(planted: Path) -> None:
    report = optimize(planted, "good", name="tight", max_memory=10**7)
    assert report.winner is None
    assert report.artifact is None
    assert "valid candidates break a limit" in report.facts.choice.reason
    assert "MB is above 10 MB" in report.facts.choice.reason
