"""Backends on a real card: what they build answers as the module does, and opens again without compiling."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.gpu.models import ON_CARD, Convolutions, Perceptron, Wavering, answer_of, error, expected, packed, rows_for
from torchship import process
from torchship.recipe import Options

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


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-5), ("fp16", 1e-2)])
def test_what_does_not_export_runs_on_the_card(precision: str, limit: float, tmp_path: Path) -> None:
    options = GPU | {"precision": precision}
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
