"""Best first, what is mended, and what is measured again: pure functions of the trials."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from rich.console import Console

from tests.contracts.test_backends import HERE, picture
from tests.unit.optimize.test_choose import trial
from torchship.hardware import Gpu
from torchship.optimize.cache import Cache
from torchship.optimize.choose import Constraints, choose
from torchship.optimize.facts import Facts
from torchship.optimize.loop import close_ones
from torchship.optimize.page import so_far
from torchship.optimize.report import Report
from torchship.optimize.sensitivity import LayerNoise
from torchship.optimize.strategies import winners
from torchship.optimize.strategies.mixed_precision import describe, gentler, worth_it
from torchship.optimize.strategies.proposals import Proposals, hopeless, next_up, propose
from torchship.optimize.trial import Trial
from torchship.recipe import Option, Options, Recipe

INT8: Options = {"precision": "int8"}


def test_every_backend_is_tried_once_before_any_twice() -> None:
    waiting = [Recipe("a", INT8), Recipe("a"), Recipe("b")]
    assert next_up(waiting, [trial("eager")], goal="latency") == 0
    assert next_up(waiting[1:], [trial("eager"), trial("a", p50=1)], goal="latency") == 1


def test_then_the_best_backend_goes_on_and_a_failed_one_waits() -> None:
    done = [trial("slow", p50=9), trial("fast", p50=3), Trial(Recipe("broken"), "failed", failure="x")]
    waiting = [Recipe("broken"), Recipe("slow"), Recipe("fast", INT8), Recipe("fast")]
    assert next_up(waiting, done, goal="latency") == 2
    assert next_up(waiting[:2], done, goal="latency") == 1


def test_compilers_wait_for_what_the_best_quick_engine_still_proposes() -> None:
    waiting = [Recipe("inductor"), Recipe("slow", INT8), Recipe("fast", INT8)]
    done = [trial("eager", p50=20), trial("slow", p50=9), trial("fast", p50=3)]
    assert next_up(waiting, done, goal="latency") == 2
    assert next_up(waiting[:2], done, goal="latency") == 0


def test_inductor_has_its_turn_before_aoti() -> None:
    order = [recipe.backend for recipe in propose(picture(), hardware=HERE, backends=None)[0]]
    assert order[0] == "eager"
    assert order.index("onnxruntime") < order.index("inductor") < order.index("aoti")


CARD = msgspec.structs.replace(HERE, gpus=(Gpu("NVIDIA H200", 150 * 2**30, "9.0"),))
ON_CARD: Options = {"device": "cuda"}


def test_on_a_card_plain_eager_there_comes_first_and_then_what_wins_there() -> None:
    waiting, _ = propose(picture(), hardware=CARD, backends=None)
    assert waiting[0] == Recipe("eager")
    done = [trial("eager", p50=20)]
    first = waiting[1:][next_up(waiting[1:], done, goal="latency")]
    assert first == Recipe("eager", ON_CARD)
    done.append(msgspec.structs.replace(trial("eager", p50=2), recipe=first))
    left = [recipe for recipe in waiting[1:] if recipe != first]
    second = left[next_up(left, done, goal="latency")]
    assert (second.backend, second.options["precision"]) == ("kernels", "fp16")


def test_gains_on_a_card_are_told_against_eager_on_the_same_card() -> None:
    there = msgspec.structs.replace(trial("eager", p50=2.0), recipe=Recipe("eager", ON_CARD))
    half = msgspec.structs.replace(
        trial("kernels", p50=0.5), recipe=Recipe("kernels", {**ON_CARD, "precision": "fp16"})
    )
    found = choose([trial("eager", p50=20), there, half], goal="latency")
    assert found.winner == 2
    assert "4.00x better than eager device=cuda" in found.reason
    assert "40" not in found.reason
    found = choose([trial("eager", p50=20), half], goal="latency")
    assert "40.00x better than eager" in found.reason, "where that did not run, the processor's is all there is"


def test_a_card_that_is_not_used_is_told_first() -> None:
    broken = Trial(Recipe("kernels", ON_CARD), "failed", failure="build: no operator")
    trials = (trial("eager", p50=20), broken, trial("onnxruntime", p50=5))
    facts = made_facts(trials, cards=("NVIDIA H200",))
    assert facts.idle == "the NVIDIA H200 is not used: nothing valid ran on it: kernels device=cuda: build: no operator"
    assert facts.idle in str(rendered_text(facts)).splitlines()[0]
    assert not made_facts(trials).idle
    used = msgspec.structs.replace(trial("eager", p50=2), recipe=Recipe("eager", ON_CARD))
    assert not made_facts((*trials, used), cards=("NVIDIA H200",)).idle


def made_facts(trials: tuple[Trial, ...], *, cards: tuple[str, ...] = ()) -> Facts:
    return Facts(
        name="m", created="", torchship="", source="", signature="", hardware="", fingerprint="", threads=1,
        device="cpu", goal="latency", constraints=Constraints(), trials=trials, cards=cards,
        choice=choose(trials, goal="latency"),
    )  # fmt: skip


def rendered_text(facts: Facts) -> str:
    console = Console(width=300, record=True, file=io.StringIO())
    console.print(Report(facts).table())
    return console.export_text()


def test_the_best_so_far_is_told_by_the_goal_and_only_where_it_got_better() -> None:
    trials = tuple(
        msgspec.structs.replace(trial(name, p50=p50, rate=rate), seconds=10.0)
        for name, p50, rate in (("eager", 9, 500), ("worse", 20, 600), ("fast", 3, 400))
    )
    for goal, second in (("latency", "fast: 3 at 30"), ("throughput", "worse: 600 at 20")):
        drawn = str(so_far(msgspec.structs.replace(made_facts(trials), goal=goal)))
        assert drawn.count("<circle") == 2, goal
        assert f"<title>{second}</title>" in drawn
    cached = tuple(msgspec.structs.replace(each, cached=True) for each in trials)
    assert not so_far(made_facts(cached)), "nothing took any time"


def test_an_engine_far_behind_is_not_tried_again() -> None:
    done = [trial("eager", p50=20), trial("slow", p50=9), trial("fast", p50=1)]
    assert hopeless(Recipe("slow", INT8), done, goal="latency").endswith("9 times worse than the best of all")
    assert not hopeless(Recipe("fast", INT8), done, goal="latency")
    assert not hopeless(Recipe("new"), done, goal="latency")
    assert not hopeless(Recipe("slow", INT8), done, goal="size")


def test_only_refused_int8_that_would_win_is_mended() -> None:
    def refused(name: str, p50: float, **options: Option) -> Trial:
        found = trial(name, p50=p50, status="refused", passed=False)
        return msgspec.structs.replace(found, recipe=Recipe(name, dict(options)))

    fast, faster, slow = refused("a", 3, **INT8), refused("b", 2, **INT8), refused("c", 30, **INT8)
    half = refused("d", 1, precision="bf16")
    excluded = msgspec.structs.replace(fast, recipe=Recipe("a", {"precision": "int8", "exclude": ["x"]}))
    found = worth_it([trial("eager", p50=10), fast, faster, slow, half, excluded], goal="latency")
    assert [each.recipe.backend for each in found] == ["b", "a"]
    assert worth_it([trial("eager", p50=1), fast], goal="latency") == []


def test_close_ones_are_measured_again_with_eager_beside_them() -> None:
    trials = [trial("eager", p50=10), trial("a", p50=2.0), trial("b", p50=2.2), trial("c", p50=4)]
    assert close_ones(trials, choose(trials, goal="latency"), goal="latency") == [1, 2, 0]
    assert close_ones(trials, choose(trials, goal="size"), goal="size") == []
    assert close_ones(trials[:2], choose(trials[:2], goal="latency"), goal="latency") == []


def test_int8_is_mended_as_a_whole_before_layers_are_left_out() -> None:
    context: Any = SimpleNamespace(model=picture(), hardware=HERE)
    equalized, *searched = gentler(Recipe("onnxruntime", INT8), context=context)
    assert [step.transform for step in equalized.transforms] == ["equalize"]
    assert [recipe.options["range"] for recipe in searched] == ["percentile", "mse", "entropy"]
    careful = Recipe("onnxruntime", {**INT8, "bias_correction": True, "range": "mse"})
    assert len(gentler(careful, context=context)) == 1
    as_they_come = Recipe("onnxruntime", {"precision": "dynamic_int8"})  # has no ranges to choose
    assert [len(recipe.transforms) for recipe in gentler(as_they_come, context=context)] == [1]


def test_left_out_layers_are_named_worst_first() -> None:
    words = describe([LayerNoise(f"block.{i}", 10.0 + i) for i in range(8)])
    assert words.startswith("kept in float, as the most sensitive to int8: block.0 (10.0 dB), ")
    assert words.endswith("and 2 more")


def test_what_runs_on_an_accelerator_comes_first() -> None:
    waiting = [Recipe("a"), Recipe("a", {"device": "cuda"}), Recipe("b", {"provider": "CUDAExecutionProvider"})]
    done = [trial("eager"), trial("a", p50=1)]
    assert next_up(waiting, done, goal="latency") == 1
    assert next_up([waiting[0]], done, goal="latency") == 0
    assert next_up([Recipe("eager"), *waiting], [], goal="latency") == 0


def test_a_backend_that_was_only_refused_is_tried_again_before_slower_ones() -> None:
    done = [trial("slow", p50=9), trial("fast", p50=3), trial("drifts", p50=1, status="refused", passed=False)]
    waiting = [Recipe("drifts"), Recipe("slow"), Recipe("fast")]
    assert next_up(waiting, done, goal="latency") == 0
    assert next_up(waiting[1:], done, goal="latency") == 1


def test_what_won_before_is_tried_right_after_eager_and_only_where_it_is_proposed(tmp_path: Path) -> None:
    def context(module: torch.nn.Module, goal: str = "latency") -> Any:
        config, model = SimpleNamespace(goal=goal, recipes=None), SimpleNamespace(module=module, calibration=[])
        return SimpleNamespace(cache=Cache(tmp_path), model=model, hardware=HERE, config=config)

    def found(winner: Trial) -> Any:
        return SimpleNamespace(winner=winner, interrupted=False)

    seen, other = (context(torch.nn.Sequential(torch.nn.Conv2d(3, wide, 1))) for wide in (4, 8))
    for name in ("rare", "often", "often", "gone", "gone", "gone"):
        winners.learn(found(trial(name, p50=1)), context=seen)
    winners.learn(found(msgspec.structs.replace(trial("rare", p50=1), cached=True)), context=seen)
    assert winners.known(other) == ["gone", "often", "rare"]
    assert (
        winners.known(context(torch.nn.Linear(3, 4))) == winners.known(context(torch.nn.Conv1d(3, 4, 1), "size")) == []
    )
    proposals = Proposals(
        [Recipe(name) for name in ("eager", "new", "rare", "often")], goal="latency", favourites=winners.known(other)
    )
    done: list[Trial] = []
    while asked := proposals.ask(done):
        done.append(trial(asked[0].recipe.backend, p50=1))
    assert [each.recipe.backend for each in done] == ["eager", "often", "rare", "new"]


def test_where_eager_takes_long_one_favourite_comes_before_it() -> None:
    recipes = [Recipe(name) for name in ("eager", "new", "rare", "often")]
    firsts: list[str] = []

    def instead(results: Sequence[Trial]) -> list[Recipe]:
        firsts.append(results[0].recipe.backend)
        return []

    proposals = Proposals(recipes, goal="latency", instead=instead, favourites=["often", "rare"], hurried=True)
    done: list[Trial] = []
    while asked := proposals.ask(done):
        done.append(trial(asked[0].recipe.backend, p50=1))
    assert [each.recipe.backend for each in done] == ["often", "eager", "rare", "new"]
    assert firsts == ["eager"], "it is asked once, when eager is known"


def test_what_is_shipped_comes_behind_what_this_machine_learned_and_fits_kind_goal_and_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = (
        winners.ShippedRow("convolution with data", "latency", ("wide",), ("best", "second"), "here"),
        winners.ShippedRow("convolution with data", "latency", (), ("plain",), "there"),
    )
    monkeypatch.setattr(winners, "shipped", lambda: rows)

    def known(goal: str = "latency", features: tuple[str, ...] = ("wide", "other"), data: Any = (1,)) -> list[str]:
        config, hardware = SimpleNamespace(goal=goal, recipes=None), msgspec.structs.replace(HERE, features=features)
        model = SimpleNamespace(module=torch.nn.Conv2d(3, 4, 1), calibration=data)
        context: Any = SimpleNamespace(cache=Cache(tmp_path), model=model, hardware=hardware, config=config)
        if features == ("learned",):
            winners.learn(SimpleNamespace(winner=trial("second", p50=1), interrupted=False), context=context)  # type: ignore[arg-type]
        return winners.known(context)

    assert known() == ["best", "second"]
    assert known(features=("other",)) == ["plain"]
    assert known(goal="size") == known(data=()) == []
    known(features=("learned",))
    assert known() == ["second", "best"]


def test_every_shipped_winner_is_a_recipe_that_is_proposed() -> None:
    model = picture()
    model = replace(model, calibration=[model.examples[0]])
    labels = {recipe.label for recipe in propose(model, hardware=HERE, backends=["openvino", "onnxruntime"])[0]}
    assert winners.shipped()
    for row in winners.shipped():
        assert row.measured
        assert labels.issuperset(label for label in row.won if "bf16" not in label or HERE.has_bf16)
