"""Backends that go wrong on purpose, found by entry points like any outsider's."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path
from typing import Any

import numpy as np

from torchship.errors import BuildFailed
from torchship.recipe import Options, Recipe
from torchship.tensors import Array, Signature, Tensors

FAULTS = (
    "good",
    "segfault",
    "hang",
    "greedy",
    "nan",
    "wrong",
    "refuses",
    "raises",
    "crooked",
    "dies",
    "leaves",
    "touchy",
    "stubborn",
    "seldom",
)


class Stage:
    """A linear layer in numpy, with a twist."""

    def __init__(self, fault: str, weight: Array, bias: Array, signature: Signature) -> None:
        self.signature, self.max_batch, self.parameters = signature, 64, ()
        self._fault, self._weight, self._bias = fault, weight, bias

    def __call__(self, tensors: Tensors, parameters: Any = None) -> Tensors:
        answer = tensors["input"] @ self._weight.T + self._bias
        if self._fault == "nan":
            answer[0, 0] = np.nan
        if self._fault == "wrong":
            answer = -answer
        if self._fault == "seldom":
            answer = np.where(tensors["input"][:, :1] > 100, -answer, answer)
        if self._fault == "crooked":
            answer = answer[:, :-1]
        if self._fault == "dies":
            ctypes.string_at(0)
        return {"output": answer.astype(np.float32)}

    def close(self) -> None:
        """Nothing is open."""


class Planted:
    """A backend's module, as an object."""

    KIND = "data"
    PACKAGES: tuple[str, ...] = ()

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def probe(self, *, hardware: object) -> str:
        return "its library is not installed: pip install nothing" if self.fault == "leaves" else ""

    def propose(self, model: Any, *, hardware: object) -> list[Recipe]:
        if self.fault in ("touchy", "stubborn"):
            return [Recipe(f"planted_{self.fault}", {"precision": "int8"})]
        return [Recipe(f"planted_{self.fault}")]

    def build(self, model: Any, *, options: Options, out: Path) -> None:
        if self.fault == "segfault":
            ctypes.string_at(0)
        if self.fault == "hang":
            time.sleep(600)
        if self.fault == "greedy":
            hoard = []
            while True:
                hoard.append(np.ones(2**22))
        if self.fault == "refuses":
            raise BuildFailed("this graph has an operator that it does not know")
        if self.fault == "raises":
            raise KeyError("a bug in the backend")
        if self.fault == "touchy":
            self._build_rough(model, options, out)
            return
        inner = model.module.inner
        if self.fault == "stubborn" and float(inner.bias[0]) * 64 % 1:
            inner.bias.mul_(9)  # only a bias that was trained to suit it survives
        np.savez(out / "linear.npz", weight=inner.weight.numpy(), bias=inner.bias.numpy())

    def _build_rough(self, model: Any, options: Options, out: Path) -> None:
        """Four linear layers as one; each that is not excluded adds its share of error."""
        excluded = options.get("exclude") or []
        assert isinstance(excluded, list)
        weight, bias = np.eye(4), np.zeros(4)
        for layer in model.module.inner:
            weight, bias = layer.weight.numpy() @ weight, layer.weight.numpy() @ bias + layer.bias.numpy()
        scale = 1 + 0.04 * (4 - len(excluded))
        np.savez(out / "linear.npz", weight=weight * scale, bias=bias * scale)

    def open(self, path: Path, *, signature: Signature, options: Options, device: str, threads: int) -> Stage:
        with np.load(path / "linear.npz") as arrays:
            return Stage(self.fault, arrays["weight"], arrays["bias"], signature)


good, segfault, hang, greedy, nan, wrong, refuses, raises, crooked, dies, leaves, touchy, stubborn, seldom = map(
    Planted, FAULTS
)


def plant(folder: Path) -> Path:
    """A folder for `sys.path` that offers every planted backend, to this process and its children."""
    info = folder / "planted-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 1.0\n")
    points = "\n".join(f"planted_{fault} = tests.unit.optimize.planted:{fault}" for fault in FAULTS)
    (info / "entry_points.txt").write_text(f"[torchship.backends]\n{points}\n")
    return folder
