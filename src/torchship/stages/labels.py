"""Scores to names: the best classes of each row with their probabilities."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from torchship import textfiles
from torchship.errors import BadConfig
from torchship.stage import stage
from torchship.tensors import Array

_NUMBERED = re.compile(r"(\d+)[\s:,=]\s*(.+)")
_MOST = 1_000_000


@stage("logits:FP32[-1,-1] -> labels:BYTES[-1,-1], scores:FP32[-1,-1], indices:INT64[-1,-1]", batched=True)
@dataclass(kw_only=True, eq=False)
class TopK:
    """The `top_k` best classes of each row: `labels` (UTF-8), `scores` and `indices`, best first.

    `labels` is a list of names, a file (one name a line, or JSON, see `read_labels`), or `imagenet`; without it, those
    of the artifact before it in the pipeline, else the indices. `activation` makes scores of what the model gives.
    """

    labels: str | Sequence[str] = ()
    activation: Literal["softmax", "sigmoid", "none"] = "softmax"

    def __post_init__(self) -> None:
        if self.activation not in ("softmax", "sigmoid", "none"):
            raise BadConfig(f"activation is {self.activation!r}", hint="use softmax, sigmoid or none")
        self._known = read_labels(self.labels)

    def __call__(
        self,
        logits: Array,
        *,
        top_k: Annotated[int, msgspec.Meta(ge=1, le=1000, description="how many classes, best first")] = 5,
    ) -> dict[str, Array]:
        scores = activate(logits, self.activation)
        indices = top(scores, top_k)
        return {
            "labels": names_of(indices, self._known),
            "scores": np.take_along_axis(scores, indices, axis=1),
            "indices": indices,
        }


top_k = TopK


def names_of(classes: Array, known: Sequence[str]) -> Array:
    """The names of classes by their numbers, BYTES in UTF-8; the number itself where there is no name."""
    names = np.empty(classes.shape, object)
    names.ravel()[:] = [(known[n] if n < len(known) else str(n)).encode() for n in classes.ravel().tolist()]
    return names


def activate(logits: Array, how: str) -> Array:
    """Softmax over the last axis, sigmoid, or nothing; FP32, safe for large numbers."""
    if how == "softmax":
        powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return np.asarray(powers / powers.sum(axis=-1, keepdims=True))
    if how == "sigmoid":
        return np.asarray(1 / (1 + np.exp(-np.clip(logits, -80, 80))), np.float32)
    return logits


def top(scores: Array, count: int) -> Array:
    """The indices of the `count` largest scores of each row, best first. INT64."""
    classes = scores.shape[1]
    count = min(count, classes)
    if classes > 4 * count:  # a partial selection first: sorting 1,000 classes for 5 is waste
        some = np.sort(np.argpartition(-scores, count - 1, axis=1)[:, :count], axis=1)
        order = np.argsort(-np.take_along_axis(scores, some, axis=1), axis=1, kind="stable")
        return np.take_along_axis(some, order, axis=1).astype(np.int64)
    return np.argsort(-scores, axis=1, kind="stable")[:, :count].astype(np.int64)


def read_labels(source: str | Sequence[str]) -> list[str]:
    """The names of classes, by their numbers: from a list, a file, or the built-in `imagenet`.

    A file holds one name a line (`0: cat` where all lines are numbered), or JSON: a list, names by number as
    TorchServe, Keras and Transformers (`id2label`) keep them, or numbers by name. Raises NotFound, BadConfig.
    """
    if not isinstance(source, str):
        return list(source)
    if source == "imagenet":
        text = resources.files("torchship.stages").joinpath("data/imagenet.txt").read_text()
    else:
        text = textfiles.read(source)
    if text.lstrip()[:1] not in ("[", "{"):
        lines = [line.strip() for line in text.rstrip().split("\n")]
        numbered = {int(found[1]): found[2] for found in map(_NUMBERED.fullmatch, lines) if found}
        return [name for _, name in sorted(numbered.items())] if set(numbered) == set(range(len(lines))) else lines
    try:
        return _by_number(msgspec.json.decode(text))
    except (msgspec.MsgspecError, ValueError, TypeError) as fault:
        raise BadConfig(f"{source}: {fault}", hint="names as a JSON list, by number, or one a line") from None


def _by_number(found: Any) -> list[str]:
    """The names in what was JSON. Raises ValueError, TypeError."""
    if isinstance(found, dict):
        found = found.get("id2label", found)
        if all(isinstance(number, int) for number in found.values()):
            found = {number: name for name, number in found.items()}
        found = {int(number): name[-1] if isinstance(name, list) else name for number, name in found.items()}
        if not set(found) <= set(range(_MOST)):
            raise ValueError(f"classes have numbers from 0 to {_MOST - 1}")
        found = [found.get(number, str(number)) for number in range(max(found, default=-1) + 1)]
    if not all(isinstance(name, str) for name in found):
        raise TypeError("a name is not a string")
    return list(found)
