"""A search on a real card, from the reference to the published winner."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.gpu.models import CARD, ON_CARD, Perceptron, Wavering, module
from tests.unit.optimize.test_hybrid import QUICK
from tests.unit.optimize.test_overflow import Net
from torchship.optimize import search
from torchship.optimize.choose import Goal, accelerated
from torchship.optimize.report import Report
from torchship.recipe import Options, Recipe
from torchship.tensors import Free

pytestmark = ON_CARD
GPU: Options = {"device": CARD}
HALF: Options = {**GPU, "precision": "fp16"}


def searched(net: torch.nn.Module, folder: Path, width: int, recipes: list[Recipe], goal: Goal = "latency") -> Report:
    return search.optimize(
        net, (torch.randn(4, width),), recipes=recipes, goal=goal, effort=QUICK, free={"x": {0: Free(1, 8, "n")}},
        cache=folder / "cache", store=folder / "store", name="searched",
    )  # fmt: skip


def test_it_runs_on_the_card_and_is_told_against_eager_there(tmp_path: Path) -> None:
    wanted = [Recipe("eager", GPU), Recipe("eager", {**HALF, "graphs": True}), Recipe("kernels", HALF)]
    report = searched(module(Perceptron), tmp_path, 32, wanted)
    told = {trial.recipe.label: (trial.status, trial.failure) for trial in report.trials}
    assert all(status == "ok" for status, _ in told.values()), told
    assert report.facts.cards
    card = [trial for trial in report.trials if accelerated(trial.recipe)]
    assert len(card) == 3
    reference = report.trials[0]
    assert reference.timing is not None
    assert [point.batch for point in reference.timing.curve] == [1], "the processor's values matter, not its speed"
    assert report.facts.eager is not None
    if report.winner is not None and accelerated(report.winner.recipe):
        assert report.facts.eager.recipe == Recipe("eager", GPU)


def test_what_overflows_in_half_is_mended(tmp_path: Path) -> None:
    torch.manual_seed(0)
    recipe = Recipe("eager", {**HALF, "graphs": True})
    report = searched(Net(), tmp_path, 8, [recipe], goal="size")  # the processor may be quicker for so small a model
    told = {trial.recipe.label: (trial.status, trial.failure) for trial in report.trials}
    kept = [trial for trial in report.trials if trial.recipe.options.get("keep") == ["blocks.0"]]
    assert [trial.status for trial in kept] == ["ok"], told


def test_a_model_that_stays_python_is_offered_to_the_card(tmp_path: Path) -> None:
    report = search.optimize(
        module(Wavering), torch.randn(4, 32), backends=["eager"], effort=QUICK, budget=120.0,
        cache=tmp_path / "cache", store=tmp_path / "store", name="wavering",
    )  # fmt: skip
    told = {trial.recipe.label: (trial.status, trial.failure) for trial in report.trials}
    on_card = [trial for trial in report.trials if trial.recipe.options == GPU]
    assert any(trial.status == "ok" for trial in on_card), told
