"""What a search proposes and compares where there is a card, for models that export and for those that do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from tests.contracts.test_backends import HERE, picture
from tests.unit.lowering.test_variants import Pixels
from tests.unit.optimize import unexportable
from tests.unit.optimize.test_choose import trial
from torchship import plugins
from torchship.backends import hybrid, torchscript
from torchship.hardware import Gpu, Hardware
from torchship.lowering import program
from torchship.lowering.blueprint import Cut
from torchship.lowering.cuda import CudaStage
from torchship.lowering.cutting import CutModule
from torchship.optimize import publishing
from torchship.optimize.capture import capture
from torchship.optimize.choose import baseline_place, choose, is_plain
from torchship.optimize.strategies.cutting import Cutting, stands_in
from torchship.optimize.strategies.proposals import Proposals, hopeless, next_up, propose
from torchship.optimize.trial import Status, Trial
from torchship.recipe import Options, Recipe
from torchship.tensors import Signature

CARD = msgspec.structs.replace(HERE, gpus=(Gpu("NVIDIA H200", 150 * 2**30, "9.0"),))
ON_CARD: Options = {"device": "cuda"}


def ended(recipe: Recipe, *, p50: float = 1.0) -> Trial:
    return msgspec.structs.replace(trial(recipe.backend, p50=p50), recipe=recipe)


def test_half_with_graphs_comes_right_behind_the_kernels() -> None:
    waiting = propose(picture(), hardware=CARD, backends=["kernels", "eager", "torchscript", "inductor"])[0]
    order, done = list[str](), list[Trial]()
    while waiting and len(order) < 5:
        chosen = waiting.pop(next_up(waiting, done, goal="latency"))
        order.append(chosen.label)
        done.append(ended(chosen, p50=1.0 if chosen.backend == "kernels" else 2.0))
    assert order == [
        "eager",
        "eager device=cuda",
        "kernels channels_last=True device=cuda precision=fp16",
        "eager channels_last=True device=cuda graphs=True precision=fp16",
        "torchscript channels_last=True device=cuda precision=fp16",
    ]


def test_what_the_caller_puts_on_a_device_names_it() -> None:
    """What is measured on a card is opened there by whoever serves it."""
    recipes = propose(picture(), hardware=HERE, backends=["eager", "inductor", "onnxruntime"], device="cuda")[0]
    assert recipes[0] == Recipe("eager")
    assert all(
        recipe.options.get("device") == ("cuda" if recipe.backend != "onnxruntime" else None) for recipe in recipes[1:]
    )
    assert Recipe("eager", ON_CARD) in recipes


def test_torchscript_takes_pictures_channels_last_on_a_card_only() -> None:
    assert [recipe.options for recipe in torchscript.propose(picture(), hardware=CARD)] == [
        {"device": "cuda", "precision": "fp16", "channels_last": True},
        {},
    ]


def stand_ins() -> list[Recipe]:
    model = capture(unexportable.make(), torch.randn(4, 8))
    return hybrid.stand_in(model, source="", hardware=CARD, among=["kernels", "onnxruntime", "inductor"])


def test_what_does_not_export_is_offered_to_the_card_whole_in_every_precision_and_with_parts() -> None:
    on_card = [recipe.options for recipe in stand_ins() if recipe.options.get("device") == "cuda"]
    assert on_card[0] == ON_CARD
    half: Options = {**ON_CARD, "precision": "fp16"}
    assert on_card[1:] == [
        half,
        {**half, "parts": "kernels"},
        {**half, "mode": "cast"},
        {**ON_CARD, "precision": "tf32"},
    ]


def test_where_eager_fails_the_module_on_the_card_is_next_whatever_the_budget() -> None:
    failed = Trial(Recipe("eager"), "failed", failure="build: BuildFailed: torch.export cannot capture this model")
    recipes = propose(picture(), hardware=CARD, backends=["kernels", "eager"])[0]
    strategy = Proposals(recipes, goal="latency", instead=lambda trials: stand_ins())
    assert strategy.ask([])[0].urgent
    first = strategy.ask([failed])[0]
    assert first.recipe == Recipe("hybrid", ON_CARD)
    assert first.urgent
    second = strategy.ask([failed, ended(first.recipe)])[0]
    assert second.recipe.options.get("device") == "cuda"
    assert not second.urgent


def test_what_is_only_a_script_on_the_processor_is_offered_to_the_card_as_python(tmp_path: Path) -> None:
    """A script has no other precision than its own."""
    (tmp_path / "backend").mkdir()
    model = capture(unexportable.make(), torch.randn(4, 8))

    def instead(hardware: Hardware, status: Status, *, exported: bool) -> list[Options]:
        if exported:
            (tmp_path / "backend" / "program.pt2").touch()
        config = SimpleNamespace(backends=["kernels", "onnxruntime"], source="")
        context: Any = SimpleNamespace(config=config, model=model, hardware=hardware)
        eager = msgspec.structs.replace(ended(Recipe("eager")), status=status, artifact=str(tmp_path))
        return [recipe.options for recipe in Cutting(context).instead([eager])]

    assert instead(CARD, "ok", exported=False)[:2] == [ON_CARD, {**ON_CARD, "precision": "fp16"}]
    assert all(options.get("device") == "cuda" for options in instead(CARD, "ok", exported=False))
    assert instead(HERE, "ok", exported=False) == [], "there the script itself is what others are told against"
    assert {} in instead(CARD, "failed", exported=False)
    assert instead(CARD, "ok", exported=True) == []


def test_the_module_on_the_card_is_tried_late_and_before_what_won_elsewhere() -> None:
    recipes = propose(picture(), hardware=CARD, backends=["kernels", "eager"])[0]
    liked = next(recipe.label for recipe in recipes if recipe.backend == "kernels")
    strategy = Proposals(recipes, goal="latency", instead=lambda trials: [], favourites=[liked])
    done = [ended(strategy.ask([])[0].recipe)]
    asked = strategy.ask(done)[0]
    assert asked.recipe == Recipe("eager", ON_CARD)
    assert asked.urgent
    done.append(ended(asked.recipe))
    assert strategy.ask(done)[0].recipe.label == liked


def test_gains_of_a_model_that_stays_python_are_told_against_it_on_the_same_card() -> None:
    here, there = ended(Recipe("hybrid"), p50=900), ended(Recipe("hybrid", ON_CARD), p50=13)
    half = ended(Recipe("hybrid", {**ON_CARD, "precision": "fp16"}), p50=8)
    trials = [Trial(Recipe("eager"), "failed", failure="build: no"), here, there, half]
    found = choose(trials, goal="latency")
    assert baseline_place(trials, found.ranking) == 2
    assert "1.62x better than hybrid device=cuda" in found.reason
    assert is_plain(there.recipe, device="cuda")
    assert not is_plain(there.recipe)
    assert not is_plain(half.recipe, device="cuda")
    assert stands_in(there.recipe, trials[:2])
    assert not stands_in(there.recipe, trials)


def test_an_engine_that_cannot_build_the_model_is_asked_once() -> None:
    def failed(recipe: Recipe, why: str = "build: BuildFailed: torch.export cannot") -> Trial:
        return Trial(recipe, "failed", failure=why)

    half = Recipe("kernels", {**ON_CARD, "precision": "fp16"})
    other = Recipe("kernels", {**ON_CARD, "precision": "bf16"})
    reference = failed(Recipe("eager"))
    assert hopeless(other, [reference, failed(half)], goal="latency").startswith("not tried: kernels cannot build")
    assert not hopeless(other, [reference], goal="latency")
    eager = ended(Recipe("eager"))
    assert not hopeless(other, [eager, failed(half)], goal="latency"), "the model does export"
    assert hopeless(Recipe("kernels", ON_CARD), [eager, failed(half), failed(other)], goal="latency"), "not twice"
    assert not hopeless(Recipe("kernels"), [eager, failed(half), failed(other)], goal="latency"), "another device"
    assert not hopeless(other, [reference, failed(half, "killed by SIGSEGV")], goal="latency")


def test_a_winner_that_needs_a_card_takes_one_along_that_needs_none() -> None:
    plain, graphs = ended(Recipe("eager")), ended(Recipe("eager", {**ON_CARD, "graphs": True}))
    kernels = ended(Recipe("kernels", ON_CARD))
    assert publishing.portable([graphs, plain]) is plain
    assert publishing.portable([kernels, graphs, plain]) is plain
    assert publishing.portable([kernels, graphs]) is None


@pytest.mark.parametrize("options", [{"precision": "bf16", "mode": "cast"}, {"precision": "bf16"}])
def test_a_module_kept_as_python_runs_narrow_by_autocast_and_by_cast(tmp_path: Path, options: Options) -> None:
    torch.manual_seed(1)
    model = capture(unexportable.make(), torch.randn(4, 8))
    hybrid.build(model, options=options, out=tmp_path)
    stage = hybrid.open(tmp_path, signature=model.signature, options=options, device="cpu", threads=1)
    x = torch.randn(4, 8)
    with torch.no_grad():
        wanted = unexportable.make()(x)["scores"].numpy()
    found = stage({"x": x.numpy()})["scores"]
    stage.close()
    assert found.dtype == np.float32
    assert 0 < np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 0.05


def test_float32_that_a_module_kept_as_python_makes_itself_is_narrowed_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, image = Pixels().eval(), torch.randint(0, 255, (2, 3, 12, 12), dtype=torch.uint8)
    model = capture(module, (image,))
    options: Options = {"precision": "fp16", "mode": "cast"}
    hybrid.build(model, options=options, out=tmp_path)
    stage = hybrid.open(tmp_path, signature=model.signature, options=options, device="cpu", threads=1)
    (found,) = stage({"image": image.numpy()}).values()
    stage.close()
    with torch.no_grad():
        wanted = module(image).numpy()
    assert found.dtype == np.float32
    assert 0 < np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 0.01


def test_tensors_that_a_module_makes_are_put_where_the_others_are() -> None:
    """`meta` stands for the card: tensors of it and of the processor do not mix either."""

    def body(x: torch.Tensor) -> torch.Tensor:
        return x + torch.arange(4)

    there = torch.randn(2, 4, device="meta")
    with pytest.raises(RuntimeError):
        body(there)
    run: Callable[..., Any] = hybrid._on_one_device(body, "meta")
    assert run(there).device.type == run(there).device.type == "meta"

    def broken(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("it does not fit")

    with pytest.raises(RuntimeError, match="does not fit"):
        hybrid._on_one_device(broken, "meta")(there)


class Counting(torch.nn.Module):
    """Adds places that it makes itself, on the processor."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (x + torch.arange(4),)


def test_a_program_whose_module_makes_its_own_tensors_is_exported_for_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model = capture(Counting(), torch.randn(2, 4))
    answer: Any = program.export(model, device="meta").module()(torch.randn(3, 4, device="meta"))
    assert answer[0].shape == (3, 4)
    assert answer[0].device.type == "meta"


def test_a_part_on_a_card_takes_and_gives_tensors_and_fills_rows_up() -> None:
    signature = Signature.parse("x0:FP32[-1,3] -> y0:FP32[-1,3]")
    seen = list[int]()

    def code(x: torch.Tensor) -> tuple[torch.Tensor]:
        seen.append(x.shape[0])
        return (x * 2,)

    stage = CudaStage(code, signature=signature, device="cuda", bodies={2: code, 4: code})
    spec = torch.utils._pytree.treespec_dumps(torch.utils._pytree.tree_flatten(torch.zeros(1))[1])
    part = CutModule(stage, Cut("first", Recipe("kernels"), signature, spec), torch.nn.Identity())
    x = torch.randn(3, 3)
    torch.testing.assert_close(part(x), x * 2)
    assert seen == [4]
    double = x.double()
    assert part(double) is double, "what the part was not made for goes through the module itself"
    assert plugins.fact("backends", "kernels", "PARTS") == ("cuda",)
