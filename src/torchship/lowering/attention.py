"""Self-attention without the copies that `nn.MultiheadAttention` makes of queries, keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional


class SelfAttention(torch.nn.MultiheadAttention):
    """torch's own module, which takes a shorter way where queries, keys and values are one unmasked tensor.

    torch's way turns the batch behind the places and copies all three; here the attention reads them where the product
    has written them. Everything else is answered by torch.
    """

    def forward(self, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        """As `nn.MultiheadAttention.forward` does."""
        wants = dict(zip(("key_padding_mask", "need_weights", "attn_mask"), args, strict=False)) | kwargs
        masked = wants.get("key_padding_mask") is not None or wants.get("attn_mask") is not None
        plain = not masked and not wants.get("need_weights", True) and not wants.get("is_causal", False)
        if not (plain and query is key and key is value and query.dim() == 3 and self._is_short):
            return super().forward(query, key, value, *args, **kwargs)
        rows, places, width = query.shape
        packed = functional.linear(query, self.in_proj_weight, self.in_proj_bias)
        heads = packed.view(rows, places, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(heads[0], heads[1], heads[2])
        joined = mixed.transpose(1, 2).reshape(rows, places, width)
        return functional.linear(joined, self.out_proj.weight, self.out_proj.bias), None

    @property
    def _is_short(self) -> bool:
        plain = self.bias_k is None and not self.add_zero_attn and not self.training
        return bool(plain and self.batch_first and self._qkv_same_embed_dim)


def shorten(module: torch.nn.Module) -> None:
    """Let all of torch's attention inside `module` take the shorter way, in place; the paths of weights stay."""
    for part in module.modules():
        if type(part) is torch.nn.MultiheadAttention:
            part.__class__ = SelfAttention
