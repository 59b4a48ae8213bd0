"""For tests on a card: what marks them, small modules, and artifacts of these."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from torchship import plugins
from torchship.artifact import Artifact, open_artifact, package
from torchship.artifact.manifest import Provenance
from torchship.optimize.capture import capture
from torchship.recipe import Options, Recipe
from torchship.tensors import Array, Free, Tensors

CARD = "cuda"
ON_CARD = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no card"),
    pytest.mark.filterwarnings("default"),  # a card's machine brings versions of its own, which warn of other things
]
WORDS = 50  # rows of the table of `Lookup`


class Perceptron(torch.nn.Module):
    """Two linear layers: x [rows, 32] -> [rows, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.layers(x)
        return answer


class Convolutions(torch.nn.Module):
    """Two convolutions and a mean: x [rows, 3, 16, 16] -> [rows, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.Conv2d(16, 8, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.second(torch.relu(self.first(x))).mean((2, 3))
        return answer


class Recurrent(torch.nn.Module):
    """An LSTM of two layers: x [rows, steps, 12] -> [rows, steps, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = torch.nn.LSTM(12, 16, num_layers=2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.cells(x)[0]
        return answer


class Wavering(torch.nn.Module):
    """Decides by a value, so that it cannot be exported: x [rows, 32] -> [rows, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Perceptron()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.inner(x)
        return answer * 2 if float(x[0, 0]) > 1e6 else answer


class Lookup(torch.nn.Module):
    """Looks words up and is not exported, so nobody knows the table before the card does: ids [rows, 4] -> [rows]."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(WORDS, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.table(ids).sum((1, 2)) * 0 + ids.sum(1)
        return answer if float(answer[0]) < 1e6 else answer * 1


class Hungry(torch.nn.Module):
    """Takes as many MiB as its largest number says, at most 8192, and is not exported: x [rows, 1] -> [rows, 1]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mib = min(int(torch.nan_to_num(x).abs().max().clamp(max=8192)), 8192)
        taken = torch.empty(max(mib, 1) << 20, dtype=torch.uint8, device=x.device)
        return x * 2 + (taken[:1] * 0)


SHAPES: dict[type[torch.nn.Module], tuple[int, ...]] = {
    Perceptron: (32,), Convolutions: (3, 16, 16), Recurrent: (6, 12), Wavering: (32,),
    Hungry: (1,),
}  # fmt: skip


def module(kind: type[torch.nn.Module]) -> torch.nn.Module:
    """One with the same weights each time."""
    torch.manual_seed(0)
    return kind().eval()


def rows_for(kind: type[torch.nn.Module], rows: int) -> Array:
    """`rows` rows of noise."""
    return np.random.default_rng(rows).standard_normal((rows, *SHAPES[kind]), dtype=np.float32)


def expected(kind: type[torch.nn.Module], x: Array) -> Array:
    """What the module answers on the processor, in double precision."""
    with torch.inference_mode():
        found: Array = module(kind).double()(torch.from_numpy(x).double()).numpy()
    return found


def error(found: Array, wanted: Array) -> float:
    """The relative error, over all values."""
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def packed(
    kind: type[torch.nn.Module], folder: Path, *, backend: str, options: Options, example: Any = None, most: int = 4
) -> Artifact:
    """An artifact of a module for up to `most` rows, in `folder`."""
    given = torch.from_numpy(rows_for(kind, 2)) if example is None else example
    name = "x" if example is None else "ids"
    model = capture(module(kind), (given,), free={name: {0: Free(1, most, "n")}}, name=folder.name)
    (folder / "backend").mkdir(parents=True)
    plugins.load("backends", name=backend).build(model, options=options, out=folder / "backend")
    return package.pack(
        folder,
        name=folder.name,
        signature=model.signature,
        recipe=Recipe(backend, options),
        provenance=Provenance("0.1.0", "2026-01-01T00:00:00+00:00", "tests", "0" * 64),
        max_batch=most,
        inputs=model.examples[0],
    )


def answer_of(stage: Any, tensors: Tensors) -> Array:
    """The one output of a stage."""
    (found,) = stage(tensors).values()
    return np.asarray(found)


def reopened(argument: Any) -> Any:
    """For a fresh process: what an artifact answers to `x`, and how many graphs inductor compiled meanwhile."""
    from torch._inductor.graph import GraphLowering

    folder, x = argument
    compiled = [0]
    lower: Any = GraphLowering.run

    def counted(self: Any, *args: Any) -> Any:
        compiled[0] += 1
        return lower(self, *args)

    GraphLowering.run = counted  # type: ignore[method-assign]
    stage = open_artifact(folder).open(trust=True)
    found = answer_of(stage, {"x": np.array(x, np.float32)})
    stage.close()
    return found.tolist(), compiled[0]
