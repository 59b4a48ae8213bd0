"""Backends on a real card: what they build answers as the module does, and opens again without compiling."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.gpu.models import (
    ON_CARD,
    Convolutions,
    Perceptron,
    Wavering,
    answer_of,
    error,
    expected,
    module,
    packed,
    rows_for,
)
from torchship import process
from torchship.backends import kernels
from torchship.optimize.capture import capture
from torchship.optimize.transforms import rowwise
from torchship.recipe import Options
from torchship.tensors import Free

pytestmark = ON_CARD
GPU: Options = {"device": "cuda"}


@pytest.mark.parametrize(
    ("options", "limit"),
    [(GPU, 1e-5), (GPU | {"precision": "tf32"}, 5e-3), (GPU | {"precision": "fp16", "graphs": True}, 1e-2),
     (GPU | {"precision": "fp16", "channels_last": True, "graphs": True}, 1e-2)],
)  # fmt: skip
def test_eager_recipes(options: Options, limit: float, tmp_path: Path) -> None:
    artifact = packed(Convolutions, tmp_path / "eager", backend="eager", options=options)
    stage = artifact.open()
    for rows in (1, 3, 4):
        x = rows_for(Convolutions, rows)
        assert error(answer_of(stage, {"x": x}), expected(Convolutions, x)) < limit
    stage.close()


@pytest.mark.parametrize(
    ("own", "limit"),
    [({"precision": "fp32"}, 1e-5), ({"precision": "fp16"}, 1e-2), ({"precision": "fp16", "mode": "cast"}, 1e-2),
     ({"precision": "fp16", "parts": "kernels"}, 1e-2), ({"precision": "fp16", "parts": "inductor"}, 1e-2)],
)  # fmt: skip
def test_what_does_not_export_runs_on_the_card(own: Options, limit: float, tmp_path: Path) -> None:
    options = GPU | own
    stage = packed(Wavering, tmp_path / "hybrid", backend="hybrid", options=options).open(trust=True)
    x = rows_for(Wavering, 3)
    assert error(answer_of(stage, {"x": x}), expected(Wavering, x)) < limit
    stage.close()


@pytest.mark.parametrize("kind", [Perceptron, Convolutions])
def test_kernels_open_in_a_fresh_process_without_compiling(
    kind: type[Perceptron] | type[Convolutions], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed(kind, tmp_path / "kernels", backend="kernels", options=GPU | {"precision": "fp16"}, most=2)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "no inductor cache"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "no triton cache"))
    x = rows_for(kind, 2)
    argument = [str(tmp_path / "kernels"), x.tolist()]
    outcome = process.run("tests.gpu.models:reopened", argument=argument, timeout=120.0)
    assert not outcome.fault, outcome.log
    answer, compiled = outcome.value
    assert compiled == 0
    assert error(np.array(answer), expected(kind, x)) < 1e-2


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_eight_bits_in_rows_run_on_the_card(kind: str, tmp_path: Path) -> None:
    model = capture(module(Perceptron), torch.randn(4, 32), free={"x": {0: Free(1, 4, "n")}})
    changed = rowwise.apply(model, options={"format": kind})
    options = GPU | {"precision": "bf16"}
    kernels.build(changed, options=options, out=tmp_path)
    stage = kernels.open(tmp_path, signature=model.signature, options=options, device="cuda")
    for rows in (1, 3, 4):
        x = rows_for(Perceptron, rows)
        assert error(answer_of(stage, {"x": x}), expected(Perceptron, x)) < 0.1
    stage.close()
