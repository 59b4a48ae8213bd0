"""What candidates are judged on: real rows, made-up ones and laws apart; groups stay together on one side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from torchship.artifact import tensorfile
from torchship.errors import BadInput
from torchship.model import Model
from torchship.optimize import reference
from torchship.optimize.capture import capture
from torchship.optimize.judge import judged
from torchship.optimize.reference import Reference
from torchship.stage import Parameters
from torchship.tensors import Array, Signature, Tensors, TensorSpec

PLAIN = Signature.parse("x:FP32[-1,3] -> y:FP32[-1,2]")
WORDS = Signature.parse("ids:INT64[-1,n], mask:INT64[-1,n] -> y:FP32[-1,2]")


class Flat(nn.Module):
    """A module as capture leaves it: a tuple of tensors comes out."""

    tried = 0

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head, self.table = nn.Linear(3, 2), nn.Embedding(9, 3)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        if mask is None:
            return (self.head(x),)
        kept = mask[..., None].float()
        return (self.head((self.table(x) * kept).sum(1) / kept.sum(1).clamp(min=1)),)


def rows(count: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=(count, 3)).astype(np.float32)


def test_real_rows_and_made_up_ones_are_kept_apart(tmp_path: Path) -> None:
    model = Model(module=Flat(), signature=PLAIN, examples=[{"x": rows(2)}])
    held = [{"x": rows(40, seed)} for seed in (1, 2)]
    plan = Reference(tmp_path, model, held_back=held).plan
    real = [index for index, entry in enumerate(plan.entries) if entry.kind == "real"]
    given = np.concatenate([tensorfile.load(tmp_path / f"{index}.in.safetensors")["x"] for index in real])
    np.testing.assert_array_equal(given, np.concatenate([batch["x"] for batch in held]))
    assert plan.rows == 80
    assert any(entry.kind == "made" for entry in plan.entries)
    assert any(entry.law and "loud" in entry.law.words for entry in plan.entries)


def test_without_data_the_users_examples_are_real_and_noise_is_not(tmp_path: Path) -> None:
    model = Model(module=Flat(), signature=PLAIN, examples=[{"x": rows(2)}])
    plan = Reference(tmp_path, model, held_back=[]).plan
    assert [entry.kind for entry in plan.entries].count("real") == 1
    assert plan.rows == 2


def test_a_model_without_rows_is_judged_on_other_values_too_and_keeps_its_integers(tmp_path: Path) -> None:
    class Picks(torch.nn.Module):
        """x [3, 4], which [2] -> the rows of x that `which` names."""

        def forward(self, x: torch.Tensor, which: torch.Tensor) -> tuple[torch.Tensor]:
            return (x[which],)

    signature = Signature.parse("x:FP32[3,4], which:INT64[2] -> y:FP32[2,4]", batched=False)
    example: Tensors = {"x": np.ones((3, 4), np.float32), "which": np.array([2, 0])}
    model = Model(module=Picks(), signature=signature, examples=[example])
    plan = Reference(tmp_path, model, held_back=[]).plan
    made = [i for i, entry in enumerate(plan.entries) if entry.kind == "made"]
    given = [tensorfile.load(tmp_path / f"{index}.in.safetensors") for index in made]
    assert len({batch["x"].tobytes() for batch in given} - {example["x"].tobytes()}) == 2
    assert all(batch["which"].tolist() == [2, 0] for batch in given)


def test_a_made_up_mask_that_leaves_out_everything_is_only_asked_for_numbers(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(1, 9, (2, 5))
    example: Tensors = {"ids": ids, "mask": np.ones_like(ids)}
    empty: Tensors = {"ids": ids, "mask": np.zeros_like(ids)}
    module = Flat()
    module.tried = 1
    plan = Reference(tmp_path, Model(module=module, signature=WORDS, examples=[example, empty]), held_back=[]).plan
    kinds = {
        bool(tensorfile.load(tmp_path / f"{index}.in.safetensors")["mask"].any()): entry.kind
        for index, entry in enumerate(plan.entries)
        if entry.kind in ("made", "finite")
    }
    assert kinds == {True: "made", False: "finite"}


def test_answers_that_are_no_numbers_anywhere_are_refused_with_words(tmp_path: Path) -> None:
    module = Flat()
    with torch.no_grad():
        module.head.bias.fill_(torch.nan)
    with pytest.raises(BadInput, match="'y' of the model itself is NaN or infinite everywhere"):
        Reference(tmp_path, Model(module=module, signature=PLAIN, examples=[{"x": rows(2)}]), held_back=[])


def test_rows_of_one_group_are_all_on_one_side() -> None:
    samples = [{"x": rows(30, seed), "group": np.arange(30)} for seed in range(4)]
    assert reference.grouped(samples, signature=PLAIN) == list(range(30)) * 4
    model, held, theirs = reference.split(Model(module=Flat(), signature=PLAIN, examples=[]), samples)
    assert theirs is not None
    assert len(set(theirs)) == 20, "as many as a proof needs"
    assert sum(len(batch["x"]) for batch in held) == len(theirs) == 80
    fitted = np.concatenate([batch["x"] for batch in model.calibration])
    judged = np.concatenate([batch["x"] for batch in held])
    assert len(fitted) == 40
    assert not {row.tobytes() for row in fitted} & {row.tobytes() for row in judged}


def test_data_without_groups_is_halved_and_half_a_grouping_is_refused() -> None:
    batches = [rows(8, seed) for seed in range(6)]
    model, held, theirs = reference.split(Model(module=Flat(), signature=PLAIN, examples=[]), batches)
    assert (len(model.calibration), len(held), theirs) == (3, 3, None)
    with pytest.raises(BadInput, match="sample 1 names 0 groups for 8 rows"):
        reference.grouped([{"x": batches[0], "group": "a"}, {"x": batches[1]}], signature=PLAIN)


def test_a_slow_model_is_judged_on_few_rows_until_all_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(module=Flat(), signature=PLAIN, examples=[{"x": rows(2)}])
    held = [{"x": rows(40, seed)} for seed in (1, 2)]
    whole = Reference(tmp_path / "whole", model, held_back=held, groups=range(80), stepwise=True)
    assert (whole.whole, whole.rows) == (True, 80), "what is quick is answered at once"
    monkeypatch.setattr(reference, "_LONG", 0.0)
    few = Reference(tmp_path / "few", model, held_back=held, groups=range(80), stepwise=True)
    assert (few.whole, few.rows, few.plan.groups) == (False, 32, tuple(range(32)))
    assert few.left_s > 0
    hashed = few.hash
    few.grow()
    assert few.whole
    assert few.hash != hashed
    assert few.plan.groups == tuple(range(80))
    assert few.plan.yards == whole.plan.yards
    assert sorted(map(repr, few.plan.entries)) == sorted(map(repr, whole.plan.entries))
    real = [index for index, entry in enumerate(few.plan.entries) if entry.kind == "real"]
    given = np.concatenate([tensorfile.load(tmp_path / f"few/{index}.in.safetensors")["x"] for index in real])
    np.testing.assert_array_equal(given, np.concatenate([batch["x"] for batch in held]))


class Bucketing(nn.Module):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return ids % 97


def test_integers_that_narrow_arithmetic_loses_are_seen_on_made_rows(tmp_path: Path) -> None:
    model = capture(Bucketing(), [TensorSpec.parse("ids:INT64[-1,4]")])
    Reference(tmp_path, model, held_back=[])

    class Narrow(reference.EagerStage):
        def __call__(self, tensors: Tensors, parameters: Parameters = {}) -> Tensors:
            return super().__call__({name: a.astype(np.int32).astype(np.int64) for name, a in tensors.items()})

    right = judged(reference.EagerStage(model), tmp_path, signature=model.signature, law_limit=1e-3)
    wrong = judged(Narrow(model), tmp_path, signature=model.signature, law_limit=1e-3)
    assert right.evidence is not None
    assert wrong.evidence is not None
    assert not right.evidence.broken
    assert "integers on made-up rows" in wrong.evidence.broken
