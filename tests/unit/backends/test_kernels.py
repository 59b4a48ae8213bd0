"""Which code is kept for a batch size on a card; the card's times are given here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from torchship.backends import kernels
from torchship.errors import BuildFailed
from torchship.lowering import cuda


def nothing(*_: Any) -> Any: ...


@pytest.mark.parametrize(
    ("times", "convolutions", "expected"),
    [
        ([1.0, 0.8], False, ("inductor", False)),
        ([1.0, 0.995], False, ("torch", False)),  # what gains nothing is not shipped
        ([1.0, 0.8, 0.7], True, ("inductor", True)),
        ([1.0, 0.8, 0.79], True, ("inductor", False)),  # not worth a search at every opening
        ([0.8, 1.0, 0.5], True, ("torch", True)),
    ],
)
def test_the_fastest_kind(
    monkeypatch: pytest.MonkeyPatch, times: list[float], convolutions: bool, expected: tuple[str, bool]
) -> None:
    left = iter(times)
    monkeypatch.setattr(cuda, "graph_ms", lambda body, inputs: next(left))
    found = kernels._choice({"torch": nothing, "inductor": nothing}, [], searches=convolutions)
    assert found == expected
    assert not list(left), "every time that was given is looked at"


def test_fused_convolutions_need_no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    left = iter([1.0, 0.9, 0.5])
    monkeypatch.setattr(cuda, "graph_ms", lambda body, inputs: next(left))
    bodies = dict.fromkeys(("torch", "inductor", "fused"), nothing)
    assert kernels._choice(bodies, [], searches=True) == ("fused", False)


def test_a_body_runs_with_the_search_that_it_was_timed_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    seen = []
    for search in (True, False):
        kernels._searching(lambda: seen.append(torch.backends.cudnn.benchmark), search)()
    assert seen == [True, False]


@pytest.mark.filterwarnings("ignore:The tensor attributes self._flat_weights:UserWarning")
@pytest.mark.parametrize("kind", [torch.nn.LSTM, torch.nn.GRU])
def test_recurrent_layers_are_found_and_their_weights_laid_together(
    monkeypatch: pytest.MonkeyPatch, kind: type[torch.nn.LSTM]
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(torch, "_cudnn_rnn_flatten_weight", lambda *args: given.append(args))
    layer = kind(6, 8, num_layers=2, batch_first=True, bidirectional=True).eval()
    exported = torch.export.export(layer, (torch.randn(2, 5, 6),), strict=False)
    assert kernels._calls(exported, *kernels._RECURRENT)
    kernels._plain(exported)
    ((weights, each, width, _, hidden, projection, layers, batch_first, both_ways),) = given
    assert len(weights) == 16
    assert (each, width, hidden, projection, layers, batch_first, both_ways) == (4, 6, 8, 0, 2, True, True)
    plain = torch.export.export(torch.nn.Conv1d(6, 8, 3).eval(), (torch.randn(2, 6, 9),), strict=False)
    assert not kernels._calls(plain, *kernels._RECURRENT)
    assert kernels._calls(plain, "conv")


def test_what_inductor_cannot_compile_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise BuildFailed("inductor cannot compile this model")

    monkeypatch.setattr(kernels, "compiled", fails)
    exported = torch.export.export(torch.nn.Linear(6, 8).eval(), (torch.randn(2, 6),), strict=False)
    assert kernels._tried(exported, [], "from_graph") is None
    monkeypatch.setattr(kernels, "compiled", lambda *_: "code")
    assert kernels._tried(exported, [], "from_graph") == "code"
