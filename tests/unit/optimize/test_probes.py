"""A backend that may crash on a card is tried out there once, in a child, and its verdict is remembered."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tests.unit.optimize.test_choose import trial
from tests.unit.optimize.test_on_a_card import CARD, ended
from torchship import plugins, process
from torchship.hardware import Gpu
from torchship.optimize import probes
from torchship.optimize.attempt import attempt
from torchship.optimize.cache import Cache
from torchship.optimize.strategies.proposals import next_up
from torchship.process import Outcome
from torchship.recipe import Recipe

ON_CARD = Recipe("aoti", {"device": "cuda", "precision": "fp16"})
ENOUGH = probes.SECONDS + 1


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was tried out; a child of it dies as aoti's does."""
    ran: list[str] = []

    def run(target: str, *, argument: object, timeout: float) -> Outcome:
        ran.append(f"{target}({argument})")
        return Outcome(fault="killed by SIGSEGV")

    monkeypatch.setattr(process, "run", run)
    return ran


def test_a_crash_is_found_out_once_and_told_in_one_line(children: list[str], tmp_path: Path) -> None:
    for _ in range(2):
        found = probes.verdict(ON_CARD, cache=Cache(tmp_path), hardware=CARD, left=ENOUGH)
        assert found is not None
        assert found.startswith("a tiny model does not run on the NVIDIA H200 with torch ")
        assert found.endswith("killed by SIGSEGV")
    assert children == ["torchship.backends.aoti:run_tiny(cuda)"]
    newer = msgspec.structs.replace(CARD, gpus=(Gpu("NVIDIA H200", 150 * 2**30, "9.0", driver="600.1"),))
    assert probes.verdict(ON_CARD, cache=Cache(tmp_path), hardware=newer) is None, "another driver is another question"


def test_what_runs_on_the_processor_needs_none(children: list[str], tmp_path: Path) -> None:
    for recipe in (Recipe("aoti"), Recipe("kernels", {"device": "cuda"})):
        assert probes.verdict(recipe, cache=Cache(tmp_path), hardware=CARD, left=ENOUGH) == ""
    assert children == []


def test_refused_recipes_are_not_proposed_again(children: list[str], tmp_path: Path) -> None:
    cache, recipes = Cache(tmp_path), [Recipe("eager"), ON_CARD, Recipe("aoti")]
    assert probes.without_refused(recipes, cache=cache, hardware=CARD) == (recipes, {}), "nothing is known yet"
    assert children == []
    probes.verdict(ON_CARD, cache=cache, hardware=CARD, left=ENOUGH)
    kept, reasons = probes.without_refused(recipes, cache=cache, hardware=CARD)
    assert kept == [Recipe("eager"), Recipe("aoti")]
    assert list(reasons) == ["aoti on a card"]
    assert "SIGSEGV" in reasons["aoti on a card"]


def test_an_attempt_begins_with_it_and_leaves_it_where_time_is_short(children: list[str], tmp_path: Path) -> None:
    context: Any = SimpleNamespace(
        cache=Cache(tmp_path), hardware=CARD, model_hash="m", reference=SimpleNamespace(hash=""), metric_hash=""
    )
    context.of = lambda recipe: context
    context.config = SimpleNamespace(effort=None, threads=1, device="cpu", serves=False)
    late = attempt(ON_CARD, context=context, left=10.0)
    assert (late.status, children) == ("skipped", [])
    found = attempt(ON_CARD, context=context, left=ENOUGH)
    assert found.status == "failed"
    assert "a tiny model does not run" in found.failure


def test_what_must_be_tried_out_comes_last_on_the_card_and_before_the_processor() -> None:
    waiting = [ON_CARD, Recipe("inductor", {"device": "cuda"}), Recipe("onnxruntime")]
    done = [trial("eager", p50=9), ended(Recipe("kernels", {"device": "cuda"}), p50=1)]
    assert next_up(waiting, done, goal="latency") == 1
    assert next_up([waiting[2], waiting[0]], done, goal="latency") == 1


def test_the_tiny_model_runs_where_the_backend_works() -> None:
    if plugins.reason_against("backends", name="aoti"):
        pytest.skip("no compiler")
    outcome = process.run("torchship.backends.aoti:run_tiny", argument="cpu", timeout=probes.SECONDS)
    assert outcome.fault == "", outcome.log
