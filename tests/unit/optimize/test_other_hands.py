"""Models as other people write them: what once went wrong in their hands, and the right value now."""

from __future__ import annotations

import dataclasses
import threading
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Normal

from torchship.errors import CaptureFailed
from torchship.lowering import program
from torchship.optimize import reference, workspace
from torchship.optimize.capture import capture
from torchship.pipeline.wiring import relax
from torchship.tensors import Signature, TensorSpec


@dataclasses.dataclass
class State:
    h: torch.Tensor
    c: torch.Tensor


class Stack:
    """A cache as libraries write them: a plain object with a list of tensors."""

    def __init__(self) -> None:
        self.layers: list[torch.Tensor] = []

    def push(self, x: torch.Tensor) -> None:
        self.layers[0] = torch.cat([self.layers[0], x], 1)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(3, 4)

    def forward(self, x: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
        h, c = self.cell(x, (state.h, state.c))
        return h * 2, State(h, c)


class Caching(nn.Module):
    def forward(self, x: torch.Tensor, cache: Stack) -> dict[str, Any]:
        cache.push(x)
        return {"sum": cache.layers[0].sum(1), "cache": cache}


class Policy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> tuple[Normal, int]:
        mean = self.mean(x)
        return Normal(mean, torch.ones_like(mean), validate_args=False), 7


class Generating(nn.Module):
    def forward(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        return iter([x, x])


class Forces(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_(True)
        return -torch.autograd.grad(x.square().sum(), x)[0]


def names(specs: tuple[TensorSpec, ...]) -> list[str]:
    return [spec.name for spec in specs]


def test_objects_are_inputs_and_outputs() -> None:
    x, state = torch.randn(2, 3), State(torch.zeros(2, 4), torch.zeros(2, 4))
    model = capture(Recurrent(), (x, state))
    assert names(model.signature.inputs) == ["x", "state_h", "state_c"]
    assert names(model.signature.outputs) == ["output_0", "output_1_h", "output_1_c"]
    h, c = torch.randn(2, 4), torch.randn(2, 4)
    inner: Any = model.module.inner
    with torch.no_grad():
        wanted = inner.cell(x, (h, c))
        given = program.export(model).module()(x, h, c)
    torch.testing.assert_close(given[1], wanted[0])
    torch.testing.assert_close(given[2], wanted[1])
    policy = capture(Policy(), torch.randn(2, 3))
    assert names(policy.signature.outputs) == ["output_0_loc", "output_0_scale"]
    assert any("output_1" in note and "int" in note for note in policy.module.notes)  # type: ignore[union-attr]


def test_a_cache_that_forward_writes_into_is_new_for_each_call() -> None:
    cache = Stack()
    cache.layers.append(torch.ones(2, 5))
    model = capture(Caching(), (torch.ones(2, 1), cache))
    assert names(model.signature.inputs) == ["x", "cache_layers_0"]
    assert names(model.signature.outputs) == ["sum", "cache_layers_0"]
    for _ in range(2):
        total, layer = model.module(torch.ones(2, 1), torch.full((2, 5), 3.0))
        assert total.tolist() == [16, 16]
        assert layer.shape == (2, 6)
    assert cache.layers[0].shape == (2, 5)


def test_what_hides_tensors_is_refused_by_type_and_name() -> None:
    with pytest.raises(CaptureFailed, match="what Generating returns is a list_iterator"):
        capture(Generating(), torch.randn(2, 3))
    with pytest.raises(CaptureFailed, match="argument 'cache' is a list_iterator"):
        capture(Caching(), (torch.ones(2, 1), iter([torch.ones(2, 5)])))


def test_gradients_inside_forward_are_named() -> None:
    with pytest.raises(CaptureFailed, match=r"computes gradients .*test_other_hands\.py:\d+: .*autograd\.grad") as told:
        capture(Forces(), torch.randn(2, 3))
    assert "torch.func.grad" in told.value.hint


def test_bitwise_operators_on_masks_are_data(tmp_path: Path) -> None:
    class Both(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return (a & b) | (a ^ b)

    model = capture(Both(), (torch.tensor([[True, False]] * 2), torch.tensor([[True, True]] * 2)))
    program.save(program.export(model), tmp_path)
    found = program.load(tmp_path)(torch.tensor([[True, False]]), torch.tensor([[False, False]]))
    assert found[0].tolist() == [[True, False]]


def test_the_fast_path_is_not_the_reference() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=True).eval()
    padding = torch.tensor([[False, False, True], [False, False, False]])
    model = capture(encoder, {"src": torch.randn(2, 3, 8), "src_key_padding_mask": padding})
    x = torch.randn(2, 3, 8)
    with torch.inference_mode():
        ours = model.module(x, padding)[0]
    assert ours[0, 2].abs().sum() > 0  # the fast path answers 0 where a place is padded
    torch.testing.assert_close(program.export(model).module()(x, padding)[0], ours.clone())


def test_a_bounded_batch_axis_is_relaxed_alike() -> None:
    bounded = Signature(
        (TensorSpec.parse("x:FP32[n:1..16,4]"),), (TensorSpec.parse("y:FP32[n:1..16,2]"),), batched=True
    )
    assert relax(relax(bounded)) == relax(bounded)
    assert str(relax(bounded)) == "x:FP32[n,4] -> y:FP32[n,2]"


def carried(value: Any, folder: Path) -> Any:
    folder.chmod(0o700)
    workspace.put(folder / "value.pkl", value, what="it")
    return workspace.take(folder / "value.pkl")


def test_what_has_no_content_travels(tmp_path: Path) -> None:
    box: ContextVar[list[int] | None] = ContextVar("box", default=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.script(nn.Linear(3, 2).eval())
        again, lock, twice, part = carried((box, threading.Lock(), box, script), tmp_path)
    assert again.name == "box"
    assert again.get() is None
    assert twice is again
    assert lock.acquire(blocking=False)
    x = torch.randn(2, 3)
    np.testing.assert_allclose(part(x).detach(), script(x).detach())


def test_code_keeps_the_name_of_its_file(tmp_path: Path) -> None:
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec(compile("def twice(x):\n    return 2 * x\n", "/some/script.py", "exec"), scope)
    found = carried(scope["twice"], tmp_path)
    assert found(3) == 6
    assert found.__code__.co_filename == "/some/script.py"


class Streaming(nn.Module):
    """A causal convolution that keeps the end of what it was last given."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv1d(2, 2, 3)
        self.register_buffer("past", torch.zeros(1, 2, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        past: Any = self.past
        joined = torch.cat([past, x], 2)
        past.copy_(joined[:, :, -2:])
        return self.mix(joined)  # type: ignore[no-any-return]


class Remembering(nn.Module):
    """A cache of keys in a plain attribute, whose mean is the same after the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.cache = x if self.cache is None else torch.cat([self.cache, x], 1)
        return self.cache.mean(1)


class Sampling(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x, 0.5, training=True)


@pytest.mark.parametrize(
    ("module", "x", "words"),
    [
        (Streaming(), torch.randn(1, 2, 9), r"self\.past is changed by each call"),
        (Remembering(), torch.randn(2, 3, 4), r"self\.cache is changed by each call"),
        (
            Sampling(),
            torch.randn(2, 8),
            r"random numbers at .*test_other_hands\.py:\d+: return nn\.functional\.dropout",
        ),
    ],
)
def test_what_outlives_a_call_or_is_drawn_is_refused_by_name(module: nn.Module, x: torch.Tensor, words: str) -> None:
    with pytest.raises(CaptureFailed, match=words):
        reference.refuse_unsteady(capture(module, x))


def test_what_forward_keeps_without_using_it_is_no_reason_to_refuse() -> None:
    class Counting(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen, self.table = getattr(self, "seen", 0) + 1, torch.arange(x.shape[1])
            return x * self.table

    reference.refuse_unsteady(capture(Counting(), torch.randn(2, 4)))


class Truncating(nn.Module):
    """Cuts what is longer than 20, as tokenizers and encoders do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :20] * 2 if x.shape[1] > 20 else x * 2


def test_a_length_at_which_forward_goes_another_way_is_judged() -> None:
    model = capture(Truncating(), [torch.randn(2, 5, 3), torch.randn(2, 9, 3)])
    assert max(edge["x"].shape[1] for edge in model.edges) > 20
    assert min(edge["x"].shape[1] for edge in model.edges) == 1
    assert str(model.signature) == "x:FP32[-1,-1,3] -> output:FP32[-1,0..,3]"  # not as long as the input


class Propagating(nn.Module):
    def __init__(self, layout: str) -> None:
        super().__init__()
        self.links: torch.Tensor
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # CSR is in beta
            self.register_buffer("links", (torch.eye(3) * 2).to_sparse(layout=getattr(torch, layout)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.links @ x


@pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr"])
def test_sparse_weights_are_made_dense_and_told(layout: str) -> None:
    model, x = capture(Propagating(layout), torch.randn(3, 4)), torch.randn(3, 4)
    flat: Any = model.module
    torch.testing.assert_close(flat(x)[0], 2 * x)
    assert "links: sparse, made dense" in flat.notes[0]


def test_what_needs_a_sparse_weight_is_refused_by_its_name() -> None:
    class Indexing(Propagating):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[self.links.coalesce().indices()[0]]

    with pytest.raises(CaptureFailed, match=r"^links: sparse, made dense.*so Indexing fails.* coalesce"):
        capture(Indexing("sparse_coo"), torch.randn(3, 4))


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.eye(3).to_sparse(), r"tensor 'x' is torch\.sparse_coo"),
        (torch.zeros(3, 3, dtype=torch.complex64), r"tensor 'x' is torch\.complex64"),
        (torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged), r"tensor 'x' is nested"),
    ],
)
def test_inputs_that_no_wire_carries_are_refused_by_name(tensor: torch.Tensor, words: str) -> None:
    class Plain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x.to_dense() if x.is_sparse else x.abs()) + 1

    with pytest.raises(CaptureFailed, match=words):
        capture(Plain(), tensor)


class Tagged(torch.Tensor):
    """A tensor of a class of its own, as libraries for pictures have them."""


def test_a_buffer_of_a_class_made_of_tensor_is_copied() -> None:
    class Holding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.full((4,), 3.0).as_subclass(Tagged))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.scale  # type: ignore[operator]

    x = torch.randn(2, 4)
    torch.testing.assert_close(capture(Holding(), x).module(x)[0].as_subclass(torch.Tensor), x * 3)


def test_one_hot_with_its_number_of_classes_decides_nothing() -> None:
    class Counting(nn.Module):
        def __init__(self, classes: int) -> None:
            super().__init__()
            self.classes = classes

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return nn.functional.one_hot(ids, self.classes).sum(1)

    ids = torch.randint(0, 9, (2, 4))
    assert capture(Counting(9), ids).signature.batched
    assert not capture(Counting(-1), ids).signature.batched


def test_squeeze_of_the_rows_axis_is_told_as_such() -> None:
    class Scoring(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sum(1, keepdim=True).squeeze()

    model = capture(Scoring(), torch.randn(3, 4))
    assert not model.signature.batched
    flat: Any = model.module
    assert "output 0 has shape [] for one row alone" in flat.notes[0]


class Windowed:
    """A cache as libraries write them, which keeps a number for itself."""

    def __init__(self, keys: torch.Tensor) -> None:
        self.keys, self._window = keys, torch.tensor(8)


def test_a_number_that_an_object_keeps_for_itself_costs_no_batches() -> None:
    class Attending(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            return {"y": x * 2, "cache": Windowed(x + 1)}

    model = capture(Attending(), torch.randn(2, 4))
    assert str(model.signature) == "x:FP32[-1,4] -> y:FP32[-1,4], cache_keys:FP32[-1,4]"
    flat: Any = model.module
    assert any("'cache__window'" in note for note in flat.notes)
