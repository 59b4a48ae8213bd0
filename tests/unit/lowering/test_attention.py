"""Self-attention that copies nothing answers as torch's own, and leaves to torch what it does not know."""

from __future__ import annotations

import pytest
import torch

from torchship.lowering import attention


def both(**options: object) -> tuple[torch.nn.MultiheadAttention, torch.nn.MultiheadAttention]:
    torch.manual_seed(0)
    own = torch.nn.MultiheadAttention(32, 4, batch_first=True, **options).eval()
    other = torch.nn.MultiheadAttention(32, 4, batch_first=True, **options).eval()
    other.load_state_dict(own.state_dict())
    attention.shorten(other)
    assert type(other) is attention.SelfAttention
    return own, other


X = torch.randn(3, 10, 32, generator=torch.Generator().manual_seed(1))
MASK = torch.triu(torch.full((10, 10), float("-inf")), diagonal=1)
PADDING = torch.arange(10)[None, :] >= torch.tensor([[10], [4], [7]])


@pytest.mark.parametrize(
    "wants",
    [
        {"need_weights": False},
        {},
        {"need_weights": False, "attn_mask": MASK},
        {"need_weights": False, "attn_mask": MASK, "is_causal": True},
        {"need_weights": False, "key_padding_mask": PADDING},
    ],
    ids=["plain", "weights wanted", "mask", "causal", "padding"],
)
def test_answers_as_torch(wants: dict[str, object]) -> None:
    own, other = both()
    with torch.no_grad():
        expected, weights = own(X, X, X, **wants)
        found, found_weights = other(X, X, X, **wants)
    torch.testing.assert_close(found, expected)
    assert (found_weights is None) == (weights is None)


def test_masks_given_by_position_are_seen() -> None:
    own, other = both()
    with torch.no_grad():
        torch.testing.assert_close(other(X, X, X, PADDING, False)[0], own(X, X, X, PADDING, False)[0])


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}, {"bias": False}])
def test_its_options_hold(options: dict[str, object]) -> None:
    own, other = both(**options)
    with torch.no_grad():
        torch.testing.assert_close(other(X, X, X, need_weights=False)[0], own(X, X, X, need_weights=False)[0])


def test_another_key_and_sequence_first_are_left_to_torch() -> None:
    own, other = both()
    with torch.no_grad():
        key = X + 1
        torch.testing.assert_close(other(X, key, key, need_weights=False)[0], own(X, key, key, need_weights=False)[0])
        own.batch_first = other.batch_first = False
        torch.testing.assert_close(other(X, X, X, need_weights=False)[0], own(X, X, X, need_weights=False)[0])


def test_an_export_has_no_copies_of_queries_and_keys() -> None:
    _, other = both()

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = other

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.attention(x, x, x, need_weights=False)[0]
            return found

    graph = torch.export.export(Layer(), (X,), strict=False).graph
    names = [str(node.target) for node in graph.nodes]
    assert "aten.scaled_dot_product_attention.default" in names
    assert not [name for name in names if "contiguous" in name or "clone" in name]
