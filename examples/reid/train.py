"""Trains the small embedder on tracks of vtest.avi and says how good it is: `python -m examples.reid.train`.

It learns one street with one camera from forty seconds: call it an appearance embedder of that scene, not
re-identification in general. Training frames are 0 to 399; it is evaluated on people of the written truth from frame
400 on, and on MOT clips with truth boxes, against the colour histogram that needs no training.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch.nn import functional

from examples.reid import data
from examples.reid.model import WEIGHTS, StreetEmbedder
from torchship_video.appearance import Histogram

_TEMPERATURE = 0.1
Embed = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


def train(steps: int, *, seed: int = 0, people: int = 10, each: int = 3) -> StreetEmbedder:
    """An embedder after `steps` batches of `people` tracks with `each` crops."""
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    crops = data.of_tracks()
    pixels = torch.from_numpy(crops.pixels).permute(0, 3, 1, 2).float()
    tracks = [rows for who in np.unique(crops.who) if len(rows := np.flatnonzero(crops.who == who)) >= each]
    spans = np.array([(crops.frame[rows].min(), crops.frame[rows].max()) for rows in tracks])
    together = (spans[:, None, 0] <= spans[None, :, 1]) & (spans[None, :, 0] <= spans[:, None, 1])
    print(f"{len(crops.who)} crops of {len(tracks)} tracks, {int(together.sum())} pairs of tracks at one time")
    model = StreetEmbedder().train()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    started = time.monotonic()
    for step in range(steps):
        centre = int(random.integers(len(tracks)))  # tracks that were there together teach most
        near = np.argsort(np.abs(spans.mean(1) - spans[centre].mean()) + random.uniform(0, 40, len(tracks)))
        chosen = near[:people]
        rows = np.concatenate([random.choice(tracks[track], each, replace=False) for track in chosen])
        who = torch.from_numpy(np.repeat(np.arange(len(chosen)), each))
        apart = torch.from_numpy(together[np.ix_(chosen, chosen)])[who][:, who]
        features = model.embed((vary(pixels[rows]) - model.mean) / model.std)
        loss = contrast(features, who, apart)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}, {time.monotonic() - started:.0f} s", flush=True)
    return model.eval()


def contrast(features: torch.Tensor, who: torch.Tensor, together: torch.Tensor) -> torch.Tensor:
    """Crops of one track come together, those of tracks at one time come apart; of all other pairs nothing is known."""
    same = who[:, None] == who[None, :]
    itself = torch.eye(len(who), dtype=torch.bool)
    scores = features @ features.T / _TEMPERATURE
    known = scores.masked_fill(itself | ~(same | together), -torch.inf)
    chance = known - torch.logsumexp(known, 1, keepdim=True)
    positive = same & ~itself
    return -(chance.masked_fill(~positive, 0).sum(1) / positive.sum(1)).mean()


def vary(images: torch.Tensor) -> torch.Tensor:
    """Crops as another camera might give them: mirrored, shifted, lighter or darker, tinted, partly hidden."""
    rows = len(images)
    turn = (torch.rand(rows) < 0.5).float() * -2 + 1
    scale = 1 + (torch.rand(rows, 2) - 0.5) * 0.25
    shift = (torch.rand(rows, 2) - 0.5) * 0.25
    grid = torch.zeros(rows, 2, 3)
    grid[:, 0, 0], grid[:, 1, 1], grid[:, :, 2] = turn * scale[:, 0], scale[:, 1], shift
    places = functional.affine_grid(grid, list(images.shape), align_corners=False)
    moved = functional.grid_sample(images, places, padding_mode="border", align_corners=False)
    gain = 1 + (torch.rand(rows, 1, 1, 1) - 0.5) * 0.4
    tint = 1 + (torch.rand(rows, 3, 1, 1) - 0.5) * 0.16
    moved = ((moved / 255).clamp(1e-3) ** (1 + (torch.rand(rows, 1, 1, 1) - 0.5) * 0.4)) * 255 * gain * tint
    for row in range(rows):
        if torch.rand(()) < 0.4:
            height, width = int(torch.randint(16, 50, ())), int(torch.randint(10, 40, ()))
            top, left = int(torch.randint(0, 128 - height, ())), int(torch.randint(0, 64 - width, ()))
            moved[row, :, top : top + height, left : left + width] = torch.rand(3, 1, 1) * 255
    return moved.clamp(0, 255)


def rank(embed: Embed, crops: data.Crops, *, apart: int = 20) -> tuple[float, float]:
    """AUC over pairs, and the share of crops whose most similar other one is the same person's (rank 1).

    With two cameras only pairs across them count; with one, only those at least `apart` frames apart, since
    neighbouring frames show the same pixels.
    """
    vectors = embed(crops.pixels)
    similar = vectors @ vectors.T
    if len(np.unique(crops.camera)) > 1:
        counts = crops.camera[:, None] != crops.camera[None, :]
    else:
        counts = np.abs(crops.frame[:, None] - crops.frame[None, :]) >= apart
    same = crops.who[:, None] == crops.who[None, :]
    positive, negative = similar[counts & same], similar[counts & ~same]
    order = np.argsort(np.concatenate([positive, negative]), kind="stable")
    places = np.empty(len(order))
    places[order] = np.arange(1, len(order) + 1)
    auc = (places[: len(positive)].sum() - len(positive) * (len(positive) + 1) / 2) / (len(positive) * len(negative))
    asked = (counts & same).any(1)
    nearest = np.where(counts, similar, -2).argmax(1)
    return float(auc), float((crops.who[nearest] == crops.who)[asked].mean())


def embedder(model: StreetEmbedder) -> Embed:
    """A model as a function of crops."""

    def embed(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.inference_mode():
            parts = [model(part) for part in torch.from_numpy(pixels.copy()).split(64)]
        found: NDArray[np.float32] = torch.cat(parts).numpy()
        return found

    return embed


def evaluate(model: StreetEmbedder, clips: Path | None) -> None:
    """Print AUC and rank 1 of the model and of the histogram."""
    sets = {f"vtest.avi from frame {data.TRAINED_UNTIL}, across views": data.of_truth()}
    for clip in sorted(clips.glob("*.mp4")) if clips else ():
        sets[f"{clip.stem}, truth boxes, 20 frames apart"] = data.of_mot(clip)
    for name, crops in sets.items():
        for what, embed in (("histogram", Histogram), ("trained", embedder(model))):
            auc, first = rank(embed, crops)
            print(f"{name:48} {what:10} AUC {auc:.3f}  rank-1 {first:.3f}  ({len(crops.who)} crops, "
                  f"{len(np.unique(crops.who))} people)")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clips", type=Path, help="a folder of MOT clips (NAME.mp4, NAME.gt.txt), for evaluation only")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    words = parser.parse_args()
    model = train(words.steps, seed=words.seed)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, words.out)
    print(
        f"{words.out}: {words.out.stat().st_size / 1e6:.2f} MB, {sum(p.numel() for p in model.parameters()):,} weights"
    )
    evaluate(model, words.clips)


if __name__ == "__main__":
    main()
