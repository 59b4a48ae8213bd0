"""A checkpoint's weights go into the module whole, or a sentence says what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from torchship.errors import BadConfig, NotFound
from torchship.optimize import targets
from torchship.optimize.weights import load_weights


def net(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 2))


@pytest.mark.parametrize("nest", ["", "state_dict", "model_state_dict"])
@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod."])
def test_nests_and_wrappers_of_training_scripts_are_taken_off(tmp_path: Path, nest: str, wrapper: str) -> None:
    trained = net()
    state = {wrapper + name: tensor for name, tensor in trained.state_dict().items()}
    torch.save({"epoch": 3, nest: state} if nest else state, tmp_path / "best.pth")
    module = net()
    assert load_weights(module, tmp_path / "best.pth") == len(state)
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in trained.state_dict().items())


def test_safetensors(tmp_path: Path) -> None:
    trained, module = net(), net()
    save_file(trained.state_dict(), tmp_path / "best.safetensors")
    load_weights(module, tmp_path / "best.safetensors")
    assert torch.equal(module.state_dict()["0.weight"], trained.state_dict()["0.weight"])


def test_what_does_not_fit_is_named_and_nothing_is_loaded(tmp_path: Path) -> None:
    state = net(16).state_dict() | {"extra": torch.zeros(1)}
    del state["2.bias"]
    torch.save(state, tmp_path / "wide.pth")
    module = net()
    before = module.state_dict()["0.weight"].clone()
    with pytest.raises(
        BadConfig, match=r"2\.bias is missing; extra is not in the model; 0\.weight is \[16, 4\]"
    ) as seen:
        load_weights(module, tmp_path / "wide.pth")
    assert "number of classes" in seen.value.hint
    assert torch.equal(module.state_dict()["0.weight"], before)


def test_objects_are_not_unpickled_and_foreign_files_are_named(tmp_path: Path) -> None:
    torch.save(net(), tmp_path / "whole.pth")
    with pytest.raises(BadConfig, match=r"holds a Python object \(torch\.nn\.modules"):
        load_weights(net(), tmp_path / "whole.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(BadConfig, match="not a checkpoint"):
        load_weights(net(), tmp_path / "text.pth")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(BadConfig, match=r"text\.safetensors"):
        load_weights(net(), tmp_path / "text.safetensors")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(BadConfig, match="no state dict"):
        load_weights(net(), tmp_path / "list.pth")
    with pytest.raises(NotFound, match="no file"):
        load_weights(net(), tmp_path / "none.pth")


def test_a_target_may_be_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", ["", *__import__("sys").path])
    (tmp_path / "trained_here.py").write_text("from torch import nn\ndef build(): return nn.Linear(3, 1)\n")
    module = targets.module_at(f"{tmp_path / 'trained_here.py'}:build")
    assert isinstance(module, nn.Linear)
    assert module.in_features == 3
    with pytest.raises(NotFound, match="no file"):
        targets.module_at(f"{tmp_path / 'other.py'}:build")
