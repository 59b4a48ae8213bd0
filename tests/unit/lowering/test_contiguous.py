"""Linear layers behind a transposed free axis are compiled as one product of matrices."""

from __future__ import annotations

import torch
from torch import nn

from torchship.lowering import program
from torchship.optimize.capture import capture
from torchship.tensors import TensorSpec


class Turned(nn.Module):
    """Turns its input as `nn.MultiheadAttention` does with `batch_first`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.second(self.first(x.transpose(0, 1)).transpose(0, 1).contiguous())
        return found


def test_only_what_lies_out_of_order_is_copied() -> None:
    model = capture(Turned(), [TensorSpec.parse("x:FP32[-1,5,6]")])
    plain, straight = program.export(model), program.export(model)
    graph = program.straighten(straight.graph_module).graph
    copies = [node for node in graph.nodes if node.target is torch.ops.aten.clone.default]
    linear = [node for node in graph.nodes if node.target is torch.ops.aten.linear.default]
    assert [node.args[0] in copies for node in linear] == [True, False]
    assert "aten.bmm" in str(plain.run_decompositions().graph)
    assert "aten.bmm" not in str(straight.run_decompositions().graph)
    x = torch.randn(3, 5, 6)
    with torch.inference_mode():
        assert torch.allclose(straight.module()(x)[0], model.module(x)[0], atol=1e-6)
