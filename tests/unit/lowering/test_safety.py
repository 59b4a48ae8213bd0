"""Torch archives that would run code are refused before torch sees them."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from torchship.errors import CorruptArtifact, UnsafeArtifact
from torchship.lowering.program import PROGRAM, load
from torchship.lowering.safety import refuse_code_in_program, refuse_code_in_script


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    class Plain(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (x.reshape(x.shape[0] * 2, -1).relu(),)

    rows = torch.export.Dim("rows", min=1, max=64)
    exported = torch.export.export(Plain(), (torch.ones(2, 4),), dynamic_shapes=({0: rows},))
    folder = tmp_path_factory.mktemp("good")
    torch.export.save(exported, folder / PROGRAM)
    return folder / PROGRAM


def rewritten(good: Path, out: Path, change: Callable[[str, bytes], bytes], **extra: bytes) -> Path:
    path = out / PROGRAM
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            target.writestr(name, change(name, source.read(name)))
        for name, data in extra.items():
            target.writestr(name, data)
    return path


def changed_json(edit: Callable[[Any], None]) -> Callable[[str, bytes], bytes]:
    def change(name: str, data: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return data
        content = json.loads(data)
        edit(content)
        return json.dumps(content).encode()

    return change


def set_first(content: Any, key: str, value: Any) -> bool:
    """Set the first `key` found anywhere."""
    if isinstance(content, dict):
        if key in content:
            content[key] = value
            return True
        return any(set_first(inner, key, value) for inner in content.values())
    return isinstance(content, list) and any(set_first(inner, key, value) for inner in content)


def test_a_plain_program_passes_and_runs(good: Path) -> None:
    refuse_code_in_program(good)
    assert load(good.parent)(torch.ones(3, 4))[0].shape == (6, 2)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("target", "torch.os.system"),
        ("target", "torch.ops.aten.from_file.default"),
        ("target", "torch.ops.aten.__class__.x"),
        ("target", "_operator.attrgetter"),
        ("expr_str", "__import__('os').system('true')"),
        ("expr_str", "lambdify([], 'x')()"),
        ("expr_str", "Symbol.__class__"),
        ("expr_str", "Symbol('a b; c')"),
        ("expr_str", "(1"),
        ("guards_code", ["__import__('os')"]),
    ],
)
def test_code_in_the_graph_is_refused(good: Path, tmp_path: Path, key: str, value: Any) -> None:
    def edit(content: Any) -> None:
        assert set_first(content, key, value)

    path = rewritten(good, tmp_path, changed_json(edit))
    with pytest.raises(UnsafeArtifact):
        refuse_code_in_program(path)
    with pytest.raises(UnsafeArtifact):
        load(tmp_path)


class Bomb:
    def __reduce__(self) -> Any:
        return (print, ("boom",))


def test_a_pickle_in_the_place_of_example_inputs_is_refused(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    buffer = io.BytesIO()
    torch.save(Bomb(), buffer)
    for data in (buffer.getvalue(), pickle.dumps(Bomb())):
        path = rewritten(good, tmp_path, lambda name, old, data=data: data if "sample_inputs" in name else old)  # type: ignore[misc]
        with pytest.raises(UnsafeArtifact):
            refuse_code_in_program(path)
    assert "boom" not in capsys.readouterr().out


def test_pickled_weights_and_libraries_are_refused(good: Path, tmp_path: Path) -> None:
    config = json.dumps({"config": {"w": {"path_name": "x", "use_pickle": True}}}).encode()
    with pytest.raises(UnsafeArtifact, match="pickled"):
        refuse_code_in_program(rewritten(good, tmp_path, lambda _, d: d, **{"p/data/weights/other.json": config}))
    with pytest.raises(UnsafeArtifact, match="no plain exported program"):
        refuse_code_in_program(rewritten(good, tmp_path, lambda _, d: d, **{"p/data/aotinductor/m/m.so": b"x"}))


def test_what_is_no_archive_is_corrupt(tmp_path: Path) -> None:
    (tmp_path / PROGRAM).write_bytes(b"no archive")
    for refuse in (refuse_code_in_program, refuse_code_in_script):
        with pytest.raises(CorruptArtifact):
            refuse(tmp_path / PROGRAM)


def test_a_script_that_writes_files_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "script.ts"
    for line, fine in (("torch.add(x, y)", True), ('torch.save(x, "/etc/passwd")', False), ("ops.aten.save(x)", False)):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("m/code/__torch__.py", f"def forward(self, x):\n  return {line}\n")
        if fine:
            refuse_code_in_script(path)
        else:
            with pytest.raises(UnsafeArtifact):
                refuse_code_in_script(path)
