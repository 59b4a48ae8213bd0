"""Structured pruning: what is left is the user's own module, and comes back from a state dict and a channel map."""

from __future__ import annotations

import copy

import msgspec
import pytest
import torch
from torch import nn

from torchship.errors import BadConfig, CorruptArtifact, Unsupported
from torchship.optimize import pruning
from torchship.optimize.channels import ChannelMap, Importance, Kept, Prune


class Mobile(nn.Module):
    """A stem, an inverted residual block with squeeze-excite, a concatenation and a classifier: x [n, 3, 16, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.Hardswish())
        self.wide = nn.Sequential(nn.Conv2d(32, 96, 1, bias=False), nn.BatchNorm2d(96), nn.ReLU())
        self.depth = nn.Sequential(nn.Conv2d(96, 96, 3, padding=1, groups=96, bias=False), nn.BatchNorm2d(96))
        self.squeeze = nn.Sequential(nn.Conv2d(96, 24, 1), nn.ReLU(), nn.Conv2d(24, 96, 1), nn.Hardsigmoid())
        self.narrow = nn.Sequential(nn.Conv2d(96, 32, 1, bias=False), nn.BatchNorm2d(32))
        self.side = nn.Conv2d(32, 16, 3, padding=1)
        self.head = nn.Sequential(nn.Linear(48, 64), nn.PReLU(64), nn.LayerNorm(64), nn.Linear(64, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scores [n, 10]."""
        x = self.stem(x)
        y = self.depth(self.wide(x))
        y = self.narrow(y * self.squeeze(y.mean((2, 3), keepdim=True))) + x
        scores: torch.Tensor = self.head(torch.cat([y, self.side(y)], 1).mean((2, 3)))
        return scores


class Shuffled(nn.Module):
    """Channels change places between two groups: some cannot go alone."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 16, 1)
        self.two = nn.Conv2d(16, 10, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, 10, h, w]."""
        n, _, h, w = x.shape
        y = self.one(x).view(n, 2, 8, h, w).transpose(1, 2).reshape(n, 16, h, w)
        scores: torch.Tensor = self.two(y)
        return scores


def seeded() -> Mobile:
    torch.manual_seed(0)
    net = Mobile()
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):  # statistics that matter
            part.running_mean = torch.randn(part.num_features)
            part.running_var = torch.rand(part.num_features) + 0.5
    return net.eval()


X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def pruned(net: nn.Module, wish: Prune) -> ChannelMap:
    whole, found = pruning.flops_of(net, (X,)), ChannelMap()
    for left in pruning.ends(whole, wish=wish):
        loss = (lambda module: module(X).square().mean()) if wish.importance == "taylor" else None
        found = pruning.prune(net, (X,), flops=left, wish=wish, loss=loss, known=found)
    assert pruning.flops_of(net, (X,)) <= whole * (1 - wish.flops)
    return found


@pytest.mark.parametrize("importance", ["magnitude", "taylor"])
def test_the_map_and_the_state_dict_make_the_same_module_again(importance: Importance) -> None:
    original = seeded()
    net = copy.deepcopy(original)
    data = msgspec.json.encode(pruned(net, Prune(0.5, rounds=2, importance=importance)))
    channels = msgspec.json.decode(data, type=ChannelMap)
    again = pruning.narrow(copy.deepcopy(original), channels)
    assert torch.equal(again(X), net(X)), "the kept channels of the original, at their places"
    with torch.no_grad():
        for weight in net.parameters():
            weight.mul_(1.5)
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(X), net(X))
    assert net(X).shape == (2, 10)
    widths = {part.out_channels for part in net.modules() if isinstance(part, nn.Conv2d)}
    assert all(width % 8 == 0 for width in widths)
    assert widths < {8 * number for number in range(1, 13)}


def test_layers_that_are_named_stay_as_they_are() -> None:
    net = seeded()
    pruned(net, Prune(0.3, rounds=1, keep=("stem", "squeeze.0")))
    shapes = {name: weight.shape for name, weight in net.named_parameters()}
    assert shapes["stem.0.weight"][0] == 32
    assert shapes["squeeze.0.weight"][0] == 24


def test_what_cannot_be_reached_is_refused_with_the_numbers() -> None:
    with pytest.raises(Unsupported, match="multiplications, where at most"):
        pruned(seeded(), Prune(0.999, rounds=1))


def test_channels_that_change_places_are_refused() -> None:
    torch.manual_seed(0)
    net = Shuffled().eval()
    with pytest.raises(Unsupported):
        pruned(net, Prune(0.9, rounds=1))


def test_a_network_whose_graph_of_channels_cannot_be_made_is_refused_with_words() -> None:
    import torchvision

    net = torchvision.models.shufflenet_v2_x0_5(weights=None).eval()
    with pytest.raises(Unsupported, match="this model cannot be pruned: "):
        pruning.prune(net, (torch.randn(1, 3, 64, 64),), flops=1e6)


def test_a_map_of_another_class_is_refused() -> None:
    with pytest.raises(CorruptArtifact, match="does not fit the module at 'missing'"):
        pruning.narrow(seeded(), {"missing": Kept(out=[0])})
    with pytest.raises(CorruptArtifact, match="does not fit"):
        pruning.narrow(seeded(), {"side": Kept(out=[99])})


@pytest.mark.parametrize("wish", [{"flops": 1.5}, {"rounds": 0}, {"multiple": 0}])
def test_wishes_that_make_no_sense_are_refused(wish: dict[str, float]) -> None:
    with pytest.raises(BadConfig):
        Prune(**wish)  # type: ignore[arg-type]
    with pytest.raises(BadConfig, match="needs a loss"):
        pruning.prune(seeded(), (X,), flops=1.0, wish=Prune(importance="taylor"))
