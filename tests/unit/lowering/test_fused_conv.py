"""Fused convolutions: the graph keeps its meaning, and only what may be fused is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from torchship.lowering import cuda, fused_conv


class Block(torch.nn.Module):
    """A residual block as ResNets have it, with max-pooling before."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.one, self.two = torch.nn.Conv2d(16, 16, 3, padding=1), torch.nn.Conv2d(16, 16, 1, bias=False)
        self.grouped = torch.nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.same = torch.nn.Conv2d(16, 16, 3, padding="same")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.max_pool2d(torch.relu(self.stem(x)), 3, 2, 1)
        found = self.two(torch.relu_(self.one(x)))
        found += x
        answer: torch.Tensor = self.same(torch.relu(self.grouped(torch.relu_(found)))) + found
        return answer


def exported(module: torch.nn.Module) -> tuple[torch.fx.GraphModule, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float16)
    program = torch.export.export(module.half().eval(), (x,), strict=False)
    found = program.module(check_guards=False)
    assert isinstance(found, torch.fx.GraphModule)
    return found, x


def test_a_fused_graph_answers_as_before() -> None:
    module, x = exported(Block())
    with torch.inference_mode():
        expected = module(x)
        convs = fused_conv.fuse(module, fused_conv.Tuned())
        found = module(x)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)
    assert [(conv.relu, tuple(conv.stride)) for conv in convs] == [(True, (2, 2)), (True, (1, 1)), (True, (1, 1))]
    left = [str(node.target) for node in module.graph.nodes if node.op == "call_function"]
    assert left.count("aten.conv2d.default") == 1, "groups are left to torch"
    assert "aten.conv2d.padding" in left, "and so is padding by a word"
    assert not [name for name in left if "max_pool" in name]
    assert not [name for name in left if name.startswith("aten.add_")], "nothing is added a second time in place"


def test_a_value_that_others_read_is_not_swallowed() -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 1)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            found = self.conv(x)
            return torch.relu(found), found

    module, x = exported(Twice())
    with torch.inference_mode():
        expected = module(x)
        (conv,) = fused_conv.fuse(module, fused_conv.Tuned())
        assert not conv.relu
        torch.testing.assert_close(module(x), expected)


def test_full_precision_is_left_alone() -> None:
    program = torch.export.export(Block().eval(), (torch.randn(2, 3, 32, 32),), strict=False)
    module = program.module(check_guards=False)
    assert isinstance(module, torch.fx.GraphModule)
    assert fused_conv.fuse(module, fused_conv.Tuned()) == []


def test_equal_layers_are_timed_once_and_what_was_found_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    timed, read = list[str](), list[bytes]()

    def run(*_: Any) -> None: ...

    def candidates(*_: Any) -> Any:
        for name, plan in (("torch", b""), ("cudnn 3", b"plan"), ("triton 0", b"")):
            timed.append(name)
            yield name, run, plan

    def planned(plan: bytes, device: torch.device) -> Any:
        read.append(plan)
        return run

    times = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(fused_conv, "_candidates", candidates)
    monkeypatch.setattr(fused_conv, "_planned", planned)
    monkeypatch.setattr(cuda, "median_ms", lambda work, runs: next(times))
    tuned = fused_conv.Tuned()
    module, _ = exported(Block())
    first, second, *_ = fused_conv.fuse(module, tuned)
    x, out = torch.randn(2, 3, 8, 8), torch.empty(0)
    assert tuned.run_for(first, x, None, out) is run
    assert tuned.run_for(first, x, None, out) is run
    assert (timed, read) == (["torch", "cudnn 3", "triton 0"], [b"plan"])
    key = first.key(x, None)
    assert (tuned.names, tuned.plans) == ({key: "cudnn 3"}, {key: b"plan"})
    again = fused_conv.Tuned(tuned.names, tuned.plans)
    assert again.run_for(first, x, None, out) is run
    assert read == [b"plan", b"plan"]
    assert len(timed) == 3
    assert second.key(x, None) != key
