"""The networks of examples/reid have the papers' sizes, and training says nothing of pairs that nobody knows."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
import torch
from examples.reid.data import Crops
from examples.reid.model import InstanceBatchNorm, OSNet, ResNet50IBN, StreetEmbedder
from examples.reid.train import contrast, rank


def weights(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_networks_have_as_many_weights_as_the_papers_say() -> None:
    resnet = ResNet50IBN(classes=1000)
    assert weights(resnet) == 25_557_032, "ResNet50's own number: IBN adds none"
    assert sum(isinstance(module, InstanceBatchNorm) for module in resnet.modules()) == 13, "conv2_x to conv4_x"
    assert weights(OSNet()) / 1e6 == pytest.approx(2.2, abs=0.05)


def test_embeddings_have_length_one_and_crops_come_as_bytes() -> None:
    crops = torch.randint(0, 255, (2, 128, 64, 3), dtype=torch.uint8)
    found = StreetEmbedder().eval()(crops)
    assert found.shape == (2, 128)
    assert found.norm(dim=1).tolist() == pytest.approx([1, 1], abs=1e-5)
    assert ResNet50IBN().eval()(torch.zeros(1, 3, 64, 32)).shape == (1, 2048)


def test_pairs_of_which_nothing_is_known_do_not_move_the_loss() -> None:
    torch.manual_seed(0)
    who = torch.tensor([0, 0, 1, 1, 2, 2])
    together = who[:, None] != who[None, :]
    features = torch.nn.functional.normalize(torch.randn(6, 8), dim=1)
    moved = features.clone()
    moved[4:] = torch.nn.functional.normalize(torch.randn(2, 8), dim=1)
    unknown = together.clone()
    unknown[4:, :], unknown[:, 4:] = False, False
    assert contrast(features, who, unknown)[None][0] != contrast(features, who, together)
    of_first = [contrast(f, who, unknown) - contrast(f[4:], who[4:], unknown[4:, 4:]) / 3 for f in (features, moved)]
    assert of_first[0] == pytest.approx(float(of_first[1]), abs=1e-5)


def test_rank_counts_pairs_across_cameras_or_far_apart() -> None:
    numpy = pytest.importorskip("numpy")
    vectors = numpy.eye(3, dtype=numpy.float32)[[0, 1, 0, 1]]
    pixels = numpy.zeros((4, 128, 64, 3), numpy.uint8)
    crops = Crops(pixels, numpy.array([1, 2, 1, 2]), numpy.array([0, 0, 1, 1]), numpy.array([0, 0, 5, 5]))
    assert rank(lambda _: vectors, crops) == (1.0, 1.0)
    assert rank(lambda _: vectors[[0, 1, 1, 0]], crops) == (0.0, 0.0)
