"""Tensors as the command line writes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from torchship.cli import _tensorfiles
from torchship.tensors import bytes_array


def test_what_is_not_finite_is_told_as_servers_tell_it(tmp_path: Path) -> None:
    numbers = np.array([[1.5, np.nan], [np.inf, -np.inf]], np.float32)
    _tensorfiles.write(tmp_path / "y.json", {"y": numbers, "name": bytes_array([b"a", b"\xff"])})
    first, second = json.loads((tmp_path / "y.json").read_text())
    assert first == {"name": "y", "datatype": "FP32", "shape": [2, 2], "data": [1.5, "NaN", "Infinity", "-Infinity"]}
    assert second["data"] == ["a", "\N{REPLACEMENT CHARACTER}"]
