"""Sentences to tensors, sentences that calibrate, and pairs whose similarity is known."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.text.model import LONGEST, weights_folder
from torchship.stage import stage

Array = NDArray[Any]

# a question, what answers it, and what only shares words with it
TRIPLES = (
    (
        "How do I reset my password?",
        "I forgot my login and need a new one.",
        "The password of kings was a golden seal.",
    ),
    ("The cat sleeps on the sofa.", "A kitten is napping on the couch.", "The sofa was sold on Monday."),
    ("Stock markets fell sharply today.", "Shares dropped a lot this morning.", "She fell off the market stall."),
    ("It will rain tomorrow in Paris.", "Showers are expected in the French capital.", "Paris won the match tomorrow."),
    ("He plays the violin very well.", "She is a gifted musician.", "He fixed the brakes very well."),
    ("The bank raised its interest rates.", "Borrowing money became more expensive.", "We sat on the river bank."),
    ("How tall is Mount Everest?", "The highest mountain measures 8849 metres.", "Everest was the name of his dog."),
    (
        "My phone battery dies too fast.",
        "The charge of my mobile lasts only an hour.",
        "The artillery battery fired fast.",
    ),
)


@functools.cache
def tokenizer() -> Any:
    """The tokenizer that the weights were trained with."""
    from tokenizers import Tokenizer

    found = Tokenizer.from_file(str(weights_folder() / "tokenizer.json"))
    found.enable_truncation(LONGEST)
    found.enable_padding()
    return found


def encode(texts: Sequence[str]) -> dict[str, Array]:
    """`ids` and `mask`, INT64 [rows, length of the longest]."""
    found = tokenizer().encode_batch(list(texts))
    return {
        "ids": np.asarray([row.ids for row in found], np.int64),
        "mask": np.asarray([row.attention_mask for row in found], np.int64),
    }


@stage("text:BYTES[-1] -> ids:INT64[-1,-1], mask:INT64[-1,-1]")
def tokens(text: Array) -> dict[str, Array]:
    """UTF-8 sentences of one request to padded token ids and their mask."""
    return encode([item.decode() for item in text])


def calibration() -> Iterator[dict[str, Array]]:
    """Real sentences in batches, short and long."""
    every = [sentence for triple in TRIPLES for sentence in triple]
    for start in range(0, len(every), 4):
        yield encode(every[start : start + 4])
    yield encode([" ".join(every[:8]), " ".join(every[8:16])])


def margin(stage: Callable[..., Any]) -> float:
    """By how much, in the mean, the true pair is closer than the pair that only shares words (cosine, -2 to 2)."""
    return float(np.mean([good - bad for good, bad in similarities(stage)]))


def similarities(stage: Callable[..., Any]) -> list[tuple[float, float]]:
    """Cosine similarity of each question to its answer, and to its distractor."""
    found = []
    for triple in TRIPLES:
        vectors = stage(encode(triple))["embedding"]
        found.append((float(vectors[0] @ vectors[1]), float(vectors[0] @ vectors[2])))
    return found
