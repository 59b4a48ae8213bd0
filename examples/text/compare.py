"""Prints the similarities of the example pairs, by the module or by an artifact: `python -m examples.text.compare`."""

from __future__ import annotations

import argparse
import functools
from typing import Any

import torch

from examples.text.model import MiniLM, minilm
from examples.text.sentences import TRIPLES, margin, similarities


@functools.cache
def _module() -> MiniLM:
    return minilm()


def eager(tensors: Any) -> Any:
    """The module as a function of numpy tensors."""
    with torch.inference_mode():
        found = _module()(torch.from_numpy(tensors["ids"]), torch.from_numpy(tensors["mask"]))
    return {name: tensor.numpy() for name, tensor in found.items()}


def main() -> None:
    """One line a triple: the similarity of the answer, and of the sentence that only shares words."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--artifact", help="a folder or a name in the store; without it the fp32 module is asked")
    given = parser.parse_args()
    if given.artifact:
        from torchship.artifact import open_stage

        stage: Any = open_stage(given.artifact)
    else:
        stage = eager
    for (question, answer, other), (good, bad) in zip(TRIPLES, similarities(stage), strict=True):
        print(f"{question}\n  {good:6.3f}  {answer}\n  {bad:6.3f}  {other}")
    print(f"mean margin {margin(stage):.3f}")


if __name__ == "__main__":
    main()
