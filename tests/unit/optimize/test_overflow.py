"""fp16 that overflows is answered by the smallest modules in fp32 that hold the large values."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.unit.optimize.test_choose import trial
from tests.unit.optimize.test_hybrid import QUICK
from torchship.backends import eager
from torchship.model import Model
from torchship.optimize import loop, search
from torchship.optimize.capture import capture
from torchship.optimize.strategies import Asked
from torchship.optimize.strategies.overflow import LARGEST, Overflow, _common, beyond, worth_it
from torchship.optimize.trial import Status, Trial
from torchship.recipe import Options, Recipe

HALF: Options = {"precision": "fp16", "mode": "cast"}


class Wide(nn.Module):
    """A pair of layers with values of some hundred thousands between them, which the second takes back."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)
        with torch.no_grad():
            self.up.weight.mul_(2e6)
            self.down.weight.mul_(1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.down(self.act(self.up(x)))
        return answer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.blocks, self.head = (
            nn.Linear(8, 8),
            nn.ModuleList([Wide(), nn.Linear(8, 8)]),
            nn.Linear(8, 4096),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        answer: torch.Tensor = self.head(x)
        return answer


def net(module: nn.Module | None = None) -> Model:
    torch.manual_seed(0)
    return capture(module or Net(), torch.randn(16, 8))


def test_the_module_that_makes_and_reads_the_large_values_is_found() -> None:
    assert beyond(net(), limit=LARGEST) == ["blocks.0"]
    assert beyond(net(nn.Linear(8, 8)), limit=LARGEST) == []
    assert beyond(net(Wide()), limit=LARGEST) == [], "all of it is no answer"


def test_paths_have_the_innermost_module_in_common() -> None:
    assert _common(["a.b.c", "a.b.d", "a.b"]) == "a.b"
    assert _common(["a.b", "a.c.b"]) == "a"
    assert _common(["a.b"]) == "a.b"
    assert _common(["a", "b"]) == _common([]) == _common(["", "a"]) == ""


def test_what_is_kept_keeps_its_own_weights(tmp_path: Path) -> None:
    """A weight of a million is infinite once it was fp16."""
    model = net()
    options: Options = {**HALF, "keep": ["blocks.0"]}
    eager.build(model, options=options, out=tmp_path)
    stage = eager.open(tmp_path, signature=model.signature, options=options, device="cpu", threads=1)
    x = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    with torch.no_grad():
        wanted = model.module(torch.from_numpy(x))[0].numpy()
    found = next(iter(stage({"x": x}).values()))
    stage.close()
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 0.01


def refused(backend: str, p50: float, options: Options = HALF, status: Status = "refused") -> Trial:
    made = trial(backend, p50=p50, status=status, passed=False)
    return Trial(Recipe(backend, options), made.status, verdict=made.verdict, timing=made.timing)


def test_only_fp16_that_would_win_and_was_not_mended_is_worth_it() -> None:
    best = trial("eager", p50=10)
    fast = refused("kernels", 1)
    assert worth_it([best, fast, refused("eager", 2)], goal="latency") is fast
    assert worth_it([best, refused("kernels", 20)], goal="latency") is None
    assert worth_it([best, refused("kernels", 1, {"precision": "bf16"})], goal="latency") is None
    assert worth_it([best, refused("hybrid", 1)], goal="latency") is None, "it keeps nothing"
    assert worth_it([best, fast, refused("kernels", 2, {**HALF, "keep": ["a"]})], goal="latency") is None
    assert worth_it([best, refused("kernels", 1, status="failed")], goal="latency") is None


def test_it_asks_at_once_and_for_more_layers_while_the_guard_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {LARGEST: ["a"], 0.25 * LARGEST: ["a"], 0.05 * LARGEST: ["a", "b"]}
    monkeypatch.setattr("torchship.optimize.strategies.overflow.out_of_range", lambda context, *, limit: found[limit])
    context: Any = SimpleNamespace(
        config=SimpleNamespace(goal="latency"),
        deadline=time.monotonic() + 100,
        reference=SimpleNamespace(whole=True),
    )
    tried: list[Recipe] = []

    def attempt(recipe: Recipe, **given: Any) -> Trial:
        tried.append(recipe)
        if recipe.backend == "eager":
            return trial("eager", p50=10)
        if recipe.options.get("keep") == ["a", "b"] or recipe.backend == "later":
            return Trial(recipe, "ok", timing=trial("x", p50=1).timing, verdict=trial("x").verdict)
        return refused(recipe.backend, 1, recipe.options)

    class Rest:
        def ask(self, results: Any) -> list[Asked]:
            names = [Recipe("eager"), Recipe("kernels", HALF), Recipe("later")]
            return [Asked(recipe) for recipe in names if recipe not in tried]

    monkeypatch.setattr(loop, "attempt", attempt)
    done, _ = loop.run([Rest(), Overflow(context)], context=context)
    assert [recipe.options.get("keep") for recipe in tried] == [None, None, ["a"], ["a", "b"], None]
    assert done[3].notes == ("kept in fp32, as fp16 cannot hold their values: a, b",)
    assert done[3].status == "ok"


def test_a_search_mends_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    report = search.optimize(
        Net(), torch.randn(16, 8), recipes=[Recipe("eager", HALF)], effort=QUICK, goal="size",
        cache=tmp_path / "cache", store=tmp_path / "store", name="wide",
    )  # fmt: skip
    by_label = {trial.recipe.label: trial for trial in report.trials}
    broken = by_label["eager mode=cast precision=fp16"]
    assert "NaN or infinity" in broken.failure
    mended = by_label["eager keep=['blocks.0'] mode=cast precision=fp16"]
    assert mended.status == "ok", mended.failure
    assert mended.notes[0] == "kept in fp32, as fp16 cannot hold their values: blocks.0"
