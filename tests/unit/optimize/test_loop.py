"""The loop: asks the strategies in order, attempts what they want most, tells all; time and Ctrl-C are its own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tests.unit.optimize.test_choose import trial
from torchship.optimize import loop
from torchship.optimize.sensitivity import LayerNoise
from torchship.optimize.strategies import Asked
from torchship.optimize.strategies.mixed_precision import MixedPrecision
from torchship.optimize.strategies.proposals import Proposals
from torchship.optimize.trial import Trial
from torchship.recipe import Recipe


class Once:
    """Asks for each of its recipes, one after another."""

    def __init__(self, *asked: Asked) -> None:
        self.asked = list(asked)
        self.told: list[int] = []

    def ask(self, results: Sequence[Trial]) -> list[Asked]:
        self.told.append(len(results))
        while self.asked and any(result.recipe == self.asked[0].recipe for result in results):
            self.asked.pop(0)
        return list(self.asked)


@pytest.fixture
def lefts() -> list[float]:
    """The seconds that each attempt is given."""
    return []


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch, lefts: list[float]) -> list[str]:
    tried: list[str] = []

    def attempt(recipe: Recipe, **given: Any) -> Trial:
        if recipe.backend == "ctrl-c":
            raise KeyboardInterrupt
        tried.append(recipe.backend)
        lefts.append(given["left"])
        return trial(recipe.backend, status="failed" if recipe.backend == "bad" else "ok")

    monkeypatch.setattr(loop, "attempt", attempt)
    monkeypatch.setattr(loop, "known", lambda recipe, context: None)
    return tried


def context(seconds: float = 100.0) -> Any:
    return SimpleNamespace(
        deadline=time.monotonic() + seconds,
        config=SimpleNamespace(goal="latency"),
        reference=SimpleNamespace(whole=True),
    )


def asked(*names: str, **more: Any) -> list[Asked]:
    return [Asked(Recipe(name), **more) for name in names]


def test_the_first_that_asks_has_its_way_and_all_see_the_results(attempts: list[str]) -> None:
    first, second = Once(*asked("a", "b")), Once(*asked("c"))
    seen: list[tuple[int, int]] = []
    done, interrupted = loop.run(
        [first, second], context=context(), on_trial=lambda found, count, total: seen.append((count, total))
    )
    assert attempts == ["a", "b", "c"]
    assert not interrupted
    assert seen == [(1, 2), (2, 2), (3, 3)]
    assert second.told == [2, 3]
    assert [found.recipe.backend for found in done] == ["a", "b", "c"]


def test_what_needs_no_attempt_is_told_with_its_reason(attempts: list[str]) -> None:
    wanted = [
        *asked("a"),
        *asked("b", skip="not tried: slow"),
        *asked("c", failure="fine-tuning: no"),
        *asked("d", note="n"),
    ]
    done, _ = loop.run([Once(*wanted)], context=context())
    assert attempts == ["a", "d"]
    assert [(t.status, t.failure) for t in done[1:3]] == [("skipped", "not tried: slow"), ("failed", "fine-tuning: no")]
    assert done[3].notes == ("n",)


def test_once_time_is_up_only_what_is_urgent_is_tried(attempts: list[str], lefts: list[float]) -> None:
    later = Once(*asked("later"))
    done, _ = loop.run([Once(*asked("eager", urgent=True), *asked("b")), later], context=context(-1))
    assert attempts == ["eager"]
    assert lefts == [60.0], "it has a minute, whatever the budget"
    assert done[1].failure == "the budget was used up"
    assert later.told == [], "there is a valid trial: nobody else is asked"
    stand_in = Once(*asked("python", urgent=True))
    loop.run([Once(*asked("bad", urgent=True)), stand_in, Once(*asked("never"))], context=context(-1))
    assert attempts == ["eager", "bad", "python"]


def test_ctrl_c_skips_the_rest_and_asks_nobody(attempts: list[str]) -> None:
    later = Once(*asked("later"))
    done, interrupted = loop.run([Once(*asked("a", "ctrl-c", "b")), later], context=context())
    assert interrupted
    assert [(t.status, t.failure) for t in done[1:]] == [("skipped", "interrupted")] * 2
    assert later.told == []


def test_ctrl_c_between_two_attempts_skips_the_rest_too(attempts: list[str]) -> None:
    def interrupt(found: Trial, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    done, interrupted = loop.run([Once(*asked("a", "b", "c", "d"))], context=context(), on_trial=interrupt)
    assert interrupted
    assert attempts == ["a", "b"]
    assert [found.status for found in done] == ["ok", "ok", "skipped", "skipped"]


def test_where_eager_ends_badly_its_stand_ins_come_first_and_a_list_of_ones_own_has_none(attempts: list[str]) -> None:
    recipes = [Recipe("bad"), Recipe("x")]
    done, _ = loop.run([Proposals(recipes, goal="latency", instead=lambda results: [Recipe("y")])], context=context())
    assert [found.recipe.backend for found in done] == ["bad", "y", "x"]
    done, _ = loop.run([Proposals(recipes, goal="latency")], context=context())
    assert [found.recipe.backend for found in done] == ["bad", "x"]


def test_layers_go_back_to_float_until_it_holds_then_fewer_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchship.optimize.strategies import mixed_precision

    layers = tuple(LayerNoise(f"l{index}", float(index)) for index in range(16))
    monkeypatch.setattr(mixed_precision, "ranking", lambda *given, **more: layers)
    monkeypatch.setattr(mixed_precision, "gentler", lambda recipe, context: [])

    def result(recipe: Recipe, error: float, status: Any) -> Trial:
        found = trial("q", p50=1, status=status, passed=status == "ok", error=error)
        return msgspec.structs.replace(found, recipe=recipe)

    strategy = MixedPrecision(context())
    results = [trial("eager", p50=9), result(Recipe("q", {"precision": "int8"}), 1.0, "refused")]
    tried = []
    while wanted := strategy.ask(results):
        left_out = wanted[0].recipe.options["exclude"]
        assert isinstance(left_out, list)
        tried.append(len(left_out))
        status = "ok" if len(left_out) >= 5 else "refused"
        results.append(result(wanted[0].recipe, 1.0 / (1 + len(left_out)), status))
    assert tried == [1, 2, 4, 8, 6, 5]
    assert strategy.layers == layers
    assert strategy.ask(results) == []


class Growing:
    """A reference with few rows at first."""

    whole, left_s = False, 5.0

    def grow(self) -> None:
        self.whole = True


@pytest.mark.parametrize(
    ("names", "when"),
    [
        (["eager", "a", "b", "c", "d"], 2),  # one is valid beside eager
        (["eager", "bad", "bad2", "bad3", "d"], 4),
        (["eager", "bad"], 2),
    ],
)
def test_all_rows_are_judged_once_something_is_valid_on_few(
    attempts: list[str], monkeypatch: pytest.MonkeyPatch, names: list[str], when: int
) -> None:
    judged: list[str] = []

    def attempt(recipe: Recipe, **given: Any) -> Trial:
        attempts.append(recipe.backend)
        return trial(recipe.backend, status="refused" if "bad" in recipe.backend else "ok")

    def rejudged(found: Trial, **given: Any) -> Trial:
        judged.append(found.recipe.backend)
        return msgspec.structs.replace(found, status="refused") if found.recipe.backend == "a" else found

    monkeypatch.setattr(loop, "attempt", attempt)
    monkeypatch.setattr(loop, "rejudged", rejudged)
    where, told = context(), list[tuple[str, str]]()
    where.reference = Growing()
    done, _ = loop.run(
        [Once(*asked(*names))],
        context=where,
        on_trial=lambda found, count, total: told.append((found.recipe.backend, found.status)),
    )
    assert judged == names[:when]
    assert [found.recipe.backend for found in done] == names
    if "a" in names:
        assert done[1].status == "refused"
        assert told[1:3] == [("a", "ok"), ("a", "refused")]


def test_without_the_time_for_all_rows_few_must_do(attempts: list[str]) -> None:
    where = context(4.0)
    where.reference = Growing()
    done, _ = loop.run([Once(*asked("eager", "a", "b"))], context=where)
    assert [found.status for found in done] == ["ok"] * 3
    assert not where.reference.whole
