"""Axes: what is tied, what is tried, and outputs that come and go."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from torchship.errors import CaptureFailed
from torchship.optimize import rows
from torchship.optimize.capture import capture
from torchship.tensors import TensorSpec


def test_the_rows_of_a_state_are_tied_to_those_of_the_input() -> None:
    class Stateful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRU(4, 8, num_layers=2, batch_first=True)

        def forward(self, x: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            out, last = self.cell(x, state)
            return out, last

    examples = [(torch.randn(rows, time, 4), torch.randn(2, rows, 8)) for rows, time in ((3, 5), (4, 7))]
    signature = capture(Stateful(), examples).signature
    assert str(signature.inputs[1]) == "state:FP32[2,n1,8]"
    assert str(signature.outputs[1]) == "output_1:FP32[2,n1,8]"
    assert str(signature.inputs[0]) == "x:FP32[n1,n2,4]"


def test_other_lengths_are_examples_for_the_guard() -> None:
    model = capture(nn.Embedding(9, 4), [TensorSpec.parse("input:INT64[-1,time:1..8]")])
    assert len({example["input"].shape[1] for example in model.examples}) > 1


class Each(nn.Module):
    """An output for each step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.layer(step) for step in x.unbind(1)]


def test_outputs_that_come_and_go_are_refused() -> None:
    with pytest.raises(
        CaptureFailed, match=r"outputs change with the input: output_0, output_1, .* for the first"
    ) as told:
        capture(Each(), [TensorSpec.parse("x:FP32[-1,time:2..4,4]")])
    assert "stack" in told.value.hint
    assert len(capture(Each(), torch.randn(2, 3, 4)).signature.outputs) == 3


def test_outputs_that_come_with_values_leave_a_note() -> None:
    class Sometimes(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"a": x, "b": x} if x.sum() > 0 else {"a": x}

    model = capture(Sometimes(), torch.ones(2, 4))
    assert any("outputs change with the input: a, b" in note for note in model.module.notes)  # type: ignore[union-attr]
    with pytest.raises(CaptureFailed, match="outputs change"):
        capture(Sometimes(), [torch.ones(2, 4), -torch.ones(2, 4)])


@pytest.mark.filterwarnings("ignore:std")
def test_a_spread_over_rows_is_no_batch() -> None:
    class Spread(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x - x.mean(0)) / x.std(0)  # one row alone: NaN

    assert not capture(Spread(), torch.randn(4, 3)).signature.batched


def test_a_number_of_rows_that_values_decide_is_free() -> None:
    class Chosen(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[x.sum(1) > 0]

    assert str(capture(Chosen(), torch.ones(4, 3)).signature) == "x:FP32[-1,3] -> output:FP32[0..,3]"


def test_a_scalar_stays_a_scalar_and_keywords_may_come_in_any_order() -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
            return x * by

    model = capture(
        Scaled(), [{"by": torch.tensor(2.0), "x": torch.ones(3)}, {"x": torch.ones(4), "by": torch.ones(())}]
    )
    assert [tensor.dim() for tensor in model.torch_inputs(model.examples[0])] == [0, 1]
    assert str(model.signature.inputs[1]) == "x:FP32[n1]"


class Halves(nn.Module):
    """Loops for ever on infinity."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        while x.norm() > 1:
            x = x / 2
        return x


class Doubles(nn.Module):
    """Loops for ever on zeros."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        while x.abs().max() < 1:
            x = x * 2
        return x


@pytest.mark.timeout(60)
@pytest.mark.parametrize("module", [Halves(), Doubles()])
def test_a_loop_that_never_ends_on_values_of_ours_is_given_up(
    module: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "PATIENCE", 0.2)
    model = capture(module, torch.full((2, 4), 0.3))
    assert not model.signature.batched
    assert all(np.isfinite(edge["x"]).all() for edge in model.edges)
