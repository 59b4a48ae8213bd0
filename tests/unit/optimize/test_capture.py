"""Capture: nested inputs and outputs, free axes, the batch axis, and clear refusals."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, NamedTuple

import cloudpickle
import pytest
import torch
from torch import nn

from torchship.errors import BadInput, CaptureFailed
from torchship.model import Model
from torchship.optimize.capture import capture
from torchship.tensors import Free, TensorSpec


@dataclasses.dataclass
class Answer:
    logits: torch.Tensor
    hidden: Any
    nothing: None = None


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


class Words(nn.Module):
    """Integer inputs, a keyword default, a buffer, shared weights, a dataclass with a nested dict as the output."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.head = nn.Linear(8, 3)
        self.again = self.head
        self.register_buffer("scale", torch.ones(1))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None, times: float = 1.0) -> Answer:
        hidden = self.embed(ids) * times * self.scale
        if mask is not None:
            hidden = hidden * mask[..., None].float()
        return Answer(self.again(hidden.mean(1)), (hidden, None, {"sum": hidden.sum(-1)}))


def ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, 50, (rows, length))


def run(model: Model, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with torch.inference_mode():
        answer: tuple[torch.Tensor, ...] = model.module(*tensors)
    return answer


def test_nested_outputs_get_stable_names_and_none_drops() -> None:
    model = capture(Words(), {"ids": ids(2, 7), "mask": torch.ones(2, 7, dtype=torch.int64)})
    assert str(model.signature) == (
        "ids:INT64[-1,7], mask:INT64[-1,7] -> logits:FP32[-1,3], hidden_0:FP32[-1,7,8], hidden_2_sum:FP32[-1,7]"
    )
    assert model.signature.batched


def test_free_axes_are_inferred_from_two_examples() -> None:
    several = [{"ids": ids(b, n), "mask": torch.ones(b, n, dtype=torch.bool)} for b, n in ((2, 7), (3, 9))]
    model = capture(Words(), several)
    assert str(model.signature.inputs[0]) == "ids:INT64[-1,n1]"
    assert str(model.signature.inputs[1]) == "mask:BOOL[-1,n1]"
    assert str(model.signature.outputs[1]) == "hidden_0:FP32[-1,n1,8]"
    exported = torch.export.export(
        model.module, model.torch_inputs(model.examples[0]), dynamic_shapes=model.dynamic_shapes()
    )
    given = (ids(5, 4), torch.ones(5, 4, dtype=torch.bool))
    for ours, theirs in zip(run(model, *given), exported.module()(*given), strict=True):
        assert torch.allclose(ours, theirs)


def test_free_axes_can_be_given() -> None:
    model = capture(Words(), (ids(2, 7),), free={"ids": {1: Free(1, 64, "seq")}})
    assert str(model.signature.inputs[0]) == "ids:INT64[-1,seq:1..64]"
    assert str(model.signature.outputs[2]) == "hidden_2_sum:FP32[-1,seq]"
    with pytest.raises(CaptureFailed, match="unknown inputs"):
        capture(Words(), (ids(2, 7),), free={"tokens": {1: "seq"}})
    with pytest.raises(CaptureFailed, match=r"axis 1 of 'ids' is 7, but it is said to be seq:8\.\.64"):
        capture(Words(), (ids(2, 7),), free={"ids": {1: Free(8, 64, "seq")}})
    with pytest.raises(CaptureFailed, match=r"axis 1 of 'ids' is 7, but it is said to be seq:1\.\.5"):
        capture(Words(), (ids(2, 7),), free={"ids": {1: Free(1, 5, "seq")}})


def test_specs_make_their_own_inputs_by_name_or_by_order() -> None:
    model = capture(Words(), [TensorSpec.parse("ids:INT64[-1,seq]"), TensorSpec.parse("mask:INT64[-1,seq]")])
    assert str(model.signature.outputs[1]) == "hidden_0:FP32[-1,seq,8]"
    other = capture(nn.Linear(4, 2), TensorSpec.parse("features:FP32[-1,4]"))
    assert str(other.signature) == "features:FP32[-1,4] -> output:FP32[-1,2]"
    fixed = capture(nn.Linear(4, 2), TensorSpec.parse("features:FP32[3,4]"))
    assert not fixed.signature.batched
    with pytest.raises(BadInput, match="BYTES"):
        capture(nn.Linear(4, 2), TensorSpec.parse("text:BYTES[-1]"))


def test_a_module_that_mixes_rows_is_not_batched() -> None:
    class Mixing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - x.mean(0)

    model = capture(Mixing(), torch.randn(4, 3))
    assert not model.signature.batched
    assert "depends on the other rows" in model.module.notes[0]  # type: ignore[index]
    with pytest.raises(CaptureFailed, match="no batch axis"):
        capture(Mixing(), torch.randn(4, 3), batched=True)


def test_a_recurrent_net_with_time_first_is_not_batched_by_mistake() -> None:
    model = capture(nn.LSTM(4, 5), torch.randn(6, 2, 4))
    assert not model.signature.batched
    assert [spec.name for spec in model.signature.outputs] == ["output_0", "output_1_0", "output_1_1"]


def test_a_batch_of_one_becomes_two_rows() -> None:
    model = capture(nn.Linear(4, 2), torch.randn(1, 4))
    assert model.examples[0]["input"].shape == (2, 4)
    assert str(model.signature.inputs[0]) == "input:FP32[-1,4]"


def test_named_tuples_lists_and_plain_values_in_the_call() -> None:
    class Mixed(nn.Module):
        def forward(self, pair: Pair, many: list[torch.Tensor], how: str, times: int) -> Pair:
            assert how == "sum"
            return Pair(pair.first + pair.second, sum(many, start=torch.zeros(1)) * times)

    x = torch.randn(2, 3)
    model = capture(Mixed(), (Pair(x, x), [x, x], "sum", 2))
    assert [spec.name for spec in model.signature.inputs] == ["pair_0", "pair_1", "many_0", "many_1"]
    assert [spec.name for spec in model.signature.outputs] == ["first", "second"]
    assert torch.allclose(run(model, x, x, x, x)[1], 4 * x)


def test_the_given_module_is_left_alone_and_ours_is_frozen() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    model = capture(module, torch.randn(2, 4))
    assert module.training
    assert next(module.parameters()).requires_grad
    assert not model.module.training
    assert not any(p.requires_grad for p in model.module.parameters())
    x = torch.randn(3, 4)
    assert torch.equal(run(model, x)[0], run(model, x)[0])


def test_the_flat_module_copies_pickles_and_traces() -> None:
    model = capture(Words(), (ids(2, 7),))
    x = ids(3, 7)
    twin = copy.deepcopy(model.module)
    assert twin.forward.__self__ is twin  # type: ignore[attr-defined]
    again: Model = cloudpickle.loads(cloudpickle.dumps(model))
    assert torch.equal(run(again, x)[0], run(model, x)[0])
    assert torch.equal(twin(x)[0], run(model, x)[0])


def test_calibration_takes_loader_batches_single_rows_and_dicts() -> None:
    module = nn.Linear(4, 2)
    batches = [(torch.randn(8, 4), torch.zeros(8)), {"input": torch.randn(8, 4)}, torch.randn(4)]
    model = capture(module, torch.randn(2, 4), calibration=batches)
    assert [batch["input"].shape for batch in model.calibration] == [(8, 4), (8, 4), (1, 4)]
    with pytest.raises(BadInput, match="calibration sample 1"):
        capture(module, torch.randn(2, 4), calibration=[torch.randn(2, 4), torch.randn(2, 5)])


@pytest.mark.parametrize(
    ("module", "inputs", "words"),
    [
        (nn.Linear(4, 2), torch.randn(2, 5), r"fails on its example inputs \(input\[2, 5\]\)"),
        (nn.Linear(4, 2), [], "no example inputs"),
        (nn.Linear(4, 2), (3,), "hold no tensor"),
        (nn.Linear(4, 2), [torch.randn(2, 4), torch.randn(4)], "number of axes"),
    ],
)
def test_what_cannot_be_captured_is_named(module: nn.Module, inputs: Any, words: str) -> None:
    with pytest.raises(CaptureFailed, match=words) as caught:
        capture(module, inputs)
    assert caught.value.hint or "axes" in words


def test_complex_outputs_are_refused_with_a_hint() -> None:
    class Spectrum(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.fft.rfft(x)  # type: ignore[no-any-return]

    with pytest.raises(CaptureFailed, match="complex64"):
        capture(Spectrum(), torch.randn(2, 8))


def test_an_exported_model_has_no_optional_inputs() -> None:
    with pytest.raises(CaptureFailed, match=r"inputs \['bias'\] are optional"):
        capture(torch.nn.Bilinear(2, 2, 1), [TensorSpec.parse("x:FP32[-1,2]"), TensorSpec.parse("bias?:FP32[-1,2]")])


def test_the_hidden_state_of_a_recurrent_net_gets_its_rows_in_front() -> None:
    net = nn.GRU(8, 16, num_layers=2, batch_first=True)
    model = capture(net, torch.randn(3, 5, 8), free={"input": {1: "time"}})
    assert str(model.signature) == "input:FP32[-1,time,8] -> output_0:FP32[-1,time,16], output_1:FP32[-1,2,16]"
    x = torch.randn(4, 5, 8)
    with torch.inference_mode():
        wanted = net(x)[1]
    assert torch.allclose(run(model, x)[1], wanted.transpose(0, 1), atol=1e-6)


def test_a_single_free_axis_is_followed_into_the_outputs() -> None:
    model = capture(nn.Embedding(50, 4), [ids(2, 7), ids(3, 9)])
    assert str(model.signature) == "input:INT64[-1,n1] -> output:FP32[-1,n1,4]"
    alone = capture(Words(), [(ids(2, 7),), (ids(2, 9),)])
    assert str(alone.signature.inputs[0]) == "ids:INT64[-1,n1]"


def test_a_branch_on_all_rows_is_no_batch() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) if x.sum() > 0 else self.b(x)  # type: ignore[no-any-return]

    for seed in range(5):
        torch.manual_seed(seed)
        assert not capture(Branch(), torch.randn(2, 4)).signature.batched
