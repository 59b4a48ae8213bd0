"""What a candidate is judged on besides the examples: both ends of free axes, odd lengths, values at the limits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from torchship.lowering import program
from torchship.model import Model
from torchship.optimize.capture import capture
from torchship.tensors import Free, TensorSpec


class Tabled(nn.Module):
    """Adds a table of 24 positions: longer inputs are refused."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 4)
        self.register_buffer("table", torch.randn(1, 24, 4))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embed(ids) + self.table[:, : ids.shape[1]]  # type: ignore[no-any-return,index]


class Hashed(nn.Module):
    """Takes any 64-bit number for an id."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table(ids % 11)  # type: ignore[no-any-return]


class Attending(nn.Module):
    """A mask that tells which places count, or (`turned`) which do not; NaN where none is left."""

    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.turned = turned

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        kept = ~mask if self.turned else mask
        return x.masked_fill(~kept, -torch.inf).softmax(-1)


def lengths(model: Model, name: str, axis: int) -> set[int]:
    return {edge[name].shape[axis] for edge in model.edges}


def test_both_ends_of_a_declared_axis_and_odd_lengths_are_tried() -> None:
    model = capture(nn.Embedding(9, 4), [TensorSpec.parse("input:INT64[-1,time:3..200]")])
    tried = lengths(model, "input", 1)
    assert {3, 200} <= tried
    assert any(length % 2 for length in tried - {3, 200})
    assert len(lengths(model, "input", 0)) > 1


def test_a_bound_that_the_module_has_is_found_and_told() -> None:
    model = capture(Tabled(), [TensorSpec.parse("ids:INT64[-1,seq]")])
    assert str(model.signature.inputs[0]) == "ids:INT64[-1,seq:1..24]"
    assert any("seq is 1..24" in note for note in model.module.notes)  # type: ignore[union-attr]
    assert max(lengths(model, "ids", 1)) == 24


class Bags(nn.Module):
    """Sums of ids in bags, which begin at offsets: these never fall, and the last lies within the ids."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(50, 4)

    def forward(self, ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return self.bag(ids, offsets)  # type: ignore[no-any-return]


def test_offsets_that_never_fall_are_tried_as_such_and_have_no_bound() -> None:
    def bags(*sizes: int) -> tuple[torch.Tensor, torch.Tensor]:
        ends = torch.tensor(sizes).cumsum(0)
        return torch.randint(0, 50, (sum(sizes),)), torch.cat([torch.zeros(1, dtype=torch.int64), ends[:-1]])

    for examples in ([bags(3, 2, 4), bags(5, 1, 2, 6)], [bags(5, 1, 2, 6), bags(3, 2, 4)]):
        model = capture(Bags().eval(), examples)
        offsets = model.signature.inputs[1].shape[0]
        assert not isinstance(offsets, int)
        assert offsets.max is None


def test_a_bound_that_torch_suggests_is_taken() -> None:
    model = capture(Tabled(), (torch.zeros(2, 7, dtype=torch.int64),), free={"ids": {1: "seq"}})
    free = TensorSpec.parse("ids:INT64[-1,seq]")
    wide = type(model.signature)((free,), model.signature.outputs, batched=True)
    made = program.export(Model(module=model.module, signature=wide, examples=model.examples))
    assert 24 in {int(bound.upper) for bound in made.range_constraints.values() if str(bound.upper).isdigit()}


def test_no_ceiling_stands_above_a_free_axis() -> None:
    made = program.export(capture(nn.Embedding(9, 4), [TensorSpec.parse("input:INT64[-1,time]")]))
    x = torch.zeros(1, 5000, dtype=torch.int64)
    assert made.module()(x)[0].shape == (1, 5000, 4)


def test_ids_of_64_bits_are_tried_where_the_answer_depends_on_them() -> None:
    wide = capture(Hashed(), [TensorSpec.parse("ids:INT64[-1,4]")]).edges
    assert max(abs(edge["ids"]).max() for edge in wide) > 2**33
    table = capture(nn.Embedding(9, 4), [TensorSpec.parse("input:INT64[-1,4]")])
    assert all(edge["input"].max() < 9 for edge in table.edges)


def test_missing_values_are_tried_where_the_module_takes_them() -> None:
    class Filled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nan_to_num(x, nan=1.0, posinf=2.0)

    assert any(bool((edge["x"] != edge["x"]).any()) for edge in capture(Filled(), torch.randn(3, 9)).edges)
    plain = capture(nn.Linear(9, 2), torch.randn(3, 9))
    assert all(bool((edge["input"] == edge["input"]).all()) for edge in plain.edges)


def test_made_masks_attend_to_something_whichever_way_round() -> None:
    specs = [TensorSpec.parse("x:FP32[-1,8]"), TensorSpec.parse("mask:BOOL[-1,8]")]
    for turned in (False, True):
        model = capture(Attending(turned), specs)
        mask = model.examples[0]["mask"]
        assert (mask.any(1) & ~mask.all(1)).any()
        kept = ~mask if turned else mask
        assert kept.any(1).all()


def test_the_shortest_length_is_judged_where_it_was_told_not_where_it_was_found_by_trying() -> None:
    body = torch.nn.Sequential(torch.nn.Conv1d(1, 4, 10, 5), torch.nn.Conv1d(4, 2, 8, 4)).eval()
    examples = [torch.randn(2, 1, 1600), torch.randn(2, 1, 2400)]

    def shortest(**more: Any) -> int:
        return min(int(edge["input"].shape[2]) for edge in capture(body, examples, **more).edges)

    assert shortest() == 200, "an eighth of the example; 45 would run, and exporters ask for more"
    assert shortest(free={"input": {2: Free(min=100)}}) == 100
