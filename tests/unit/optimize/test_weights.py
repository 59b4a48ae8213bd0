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


@pytest.mark.parametrize(
    "prefix",
    ["model._orig_mod.", "_orig_mod.module.", "module._orig_mod.", "model.module.", "_forward_module.", "a.b.c."],
)
def test_wrappers_in_wrappers_are_taken_off(tmp_path: Path, prefix: str) -> None:
    trained, module = net(), net()
    state = {prefix + name: tensor for name, tensor in trained.state_dict().items()}
    torch.save({"epoch": 1, "model": {"state_dict": state}}, tmp_path / "best.ckpt")
    assert load_weights(module, tmp_path / "best.ckpt") == len(state)
    assert torch.equal(module.state_dict()["2.weight"], trained.state_dict()["2.weight"])
    torch.save(
        {"module." + name: value for name, value in state.items()} | {"n_averaged": torch.ones(())}, tmp_path / "a"
    )
    assert load_weights(net(), tmp_path / "a") == len(state)


class Tied(nn.Module):
    """An embedding whose weight is that of the head, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("kept", ["embed.weight", "head.weight"])
def test_a_shared_weight_is_needed_once(tmp_path: Path, kept: str) -> None:
    trained, module = Tied(), Tied()
    save_file({kept: trained.state_dict()[kept].clone()}, tmp_path / "x.safetensors")
    load_weights(module, tmp_path / "x.safetensors")
    assert torch.equal(module.head.weight, trained.head.weight)
    assert module.head.weight is module.embed.weight


def test_counters_that_old_torch_did_not_write_may_be_missing(tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in net().state_dict().items() if not name.endswith("tracked")}
    torch.save(state, tmp_path / "old.pth")
    module = net()
    load_weights(module, tmp_path / "old.pth")
    assert torch.equal(module.state_dict()["1.running_var"], state["1.running_var"])


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("new_file", [True, False])
@pytest.mark.parametrize("new_model", [True, False])
def test_weight_norms_old_and_new(tmp_path: Path, new_file: bool, new_model: bool) -> None:
    def normed(new: bool) -> nn.Module:
        how = nn.utils.parametrizations.weight_norm if new else nn.utils.weight_norm
        return nn.Sequential(how(nn.Linear(3, 2)), nn.Linear(2, 2))

    trained, module = normed(new_file), normed(new_model)
    torch.save(trained.state_dict(), tmp_path / "x.pth")
    load_weights(module, tmp_path / "x.pth")
    given = torch.randn(4, 3)
    torch.testing.assert_close(module(given), trained(given))


def test_averaged_weights_beside_raw_ones_are_offered(tmp_path: Path) -> None:
    raw, averaged = net(), net()
    nested = {"state_dict": raw.state_dict(), "state_dict_ema": averaged.state_dict(), "epoch": 3}
    flat = {f"{place}.{name}": tensor for place, part in (("model", raw), ("ema_model", averaged))
            for name, tensor in part.state_dict().items()}  # fmt: skip
    for file, keys in (
        (nested, ("state_dict", "state_dict_ema")),
        ({"state_dict": flat}, ("state_dict.model", "state_dict.ema_model")),
    ):
        torch.save(file, tmp_path / "x.pth")
        with pytest.raises(BadConfig, match="several sets") as caught:
            load_weights(net(), tmp_path / "x.pth")
        assert all(key in str(caught.value) for key in keys)
        for key, wanted in zip(keys, (raw, averaged), strict=True):
            module = net()
            load_weights(module, tmp_path / f"x.pth#{key}")
            assert torch.equal(module.state_dict()["0.weight"], wanted.state_dict()["0.weight"])
    with pytest.raises(BadConfig, match="no 'ema'"):
        load_weights(net(), tmp_path / "x.pth#ema")
    torch.save(
        {"state_dict": raw.state_dict(), "best": raw.state_dict(), "generator": {"x": torch.ones(1)}},
        tmp_path / "x.pth",
    )
    load_weights(net(), tmp_path / "x.pth")  # the same twice is no question, and other models' weights are none


def test_a_key_for_a_file_of_one_set_is_named(tmp_path: Path) -> None:
    torch.save(net().state_dict(), tmp_path / "plain.pth")
    with pytest.raises(BadConfig, match="holds no 'ema'") as caught:
        load_weights(net(), tmp_path / "plain.pth#ema")
    assert caught.value.hint == "it holds one set of weights: leave out #ema"


def test_whole_numbers_are_no_weights(tmp_path: Path) -> None:
    torch.save({name: tensor.to(torch.int8) for name, tensor in net().state_dict().items()}, tmp_path / "int8.pth")
    with pytest.raises(BadConfig, match=r"is torch\.int8"):
        load_weights(net(), tmp_path / "int8.pth")


def test_a_target_may_be_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", ["", *__import__("sys").path])
    (tmp_path / "trained_here.py").write_text("from torch import nn\ndef build(): return nn.Linear(3, 1)\n")
    module = targets.module_at(f"{tmp_path / 'trained_here.py'}:build")
    assert isinstance(module, nn.Linear)
    assert module.in_features == 3
    with pytest.raises(NotFound, match="no file"):
        targets.module_at(f"{tmp_path / 'other.py'}:build")
