"""Text in, tokens out, and token vectors to one vector a text: what sentence encoders such as MiniLM need."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from torchship.errors import BadConfig, BadInput, NotFound, Unavailable
from torchship.stage import stage
from torchship.tensors import Array


@stage("text:BYTES[-1] -> input_ids:INT64[-1,tokens], attention_mask:INT64[-1,tokens], token_type_ids:INT64[-1,tokens]")
class Tokenize:
    """Texts (UTF-8) to token ids with the tokenizer in `tokenizer`, a `tokenizer.json` of the tokenizers library.

    All texts of a job are as long as its longest, rounded up to a multiple of `multiple`, so that jobs of about one
    length meet in one batch. What is longer than `max_length` tokens is cut off; a text of more than `max_bytes` is
    refused. Raises BadInput naming the row.
    """

    def __init__(self, *, tokenizer: str, max_length: int = 256, multiple: int = 16, max_bytes: int = 100_000) -> None:
        if max_length < 1 or multiple < 1:
            raise BadConfig("max_length and multiple must be positive")
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise Unavailable("tokens need the package tokenizers", hint="pip install tokenizers") from None
        if not Path(tokenizer).is_file():
            raise NotFound(f"no tokenizer at {tokenizer}", hint="give a tokenizer.json")
        try:
            self._tokenizer = Tokenizer.from_file(tokenizer)
        except Exception as fault:  # the library raises plain Exception
            raise BadConfig(f"{tokenizer}: {fault}", hint="give a tokenizer.json of the tokenizers library") from None
        self._tokenizer.enable_truncation(max_length)
        padding = self._tokenizer.padding or {}
        self._tokenizer.enable_padding(
            pad_id=padding.get("pad_id", self._tokenizer.token_to_id("[PAD]") or 0),
            pad_token=padding.get("pad_token", "[PAD]"),
            pad_to_multiple_of=multiple,
        )
        self._max_length = max_length
        self._max_bytes = max_bytes

    @classmethod
    def declare(cls, *, max_length: int = 256, multiple: int = 16, **_: object) -> str:
        """The signature for these options."""
        most = -(-max_length // multiple) * multiple
        names = ("input_ids", "attention_mask", "token_type_ids")
        return "text:BYTES[-1] -> " + ", ".join(f"{name}:INT64[-1,tokens:1..{most}]" for name in names)

    def __call__(self, text: Array) -> tuple[Array, Array, Array]:
        found = self._tokenizer.encode_batch([self._text(item, row) for row, item in enumerate(text.tolist())])
        ids, mask, types = (
            np.asarray([getattr(one, name) for one in found], np.int64)
            for name in ("ids", "attention_mask", "type_ids")
        )
        return ids, mask, types

    def _text(self, item: object, row: int) -> str:
        if not isinstance(item, bytes):
            raise BadInput(f"row {row} holds {type(item).__name__}, expected bytes", hint="send BYTES")
        if len(item) > self._max_bytes:
            raise BadInput(f"row {row} has {len(item)} bytes, at most {self._max_bytes} are taken")
        try:
            return item.decode()
        except UnicodeDecodeError as fault:
            raise BadInput(f"row {row} is not UTF-8 (byte {fault.start})", hint="send text as UTF-8") from None


@stage("hidden:FP32[-1,tokens,-1], attention_mask:INT64[-1,tokens] -> vectors:FP32[-1,-1]", batched=True)
def pool(
    hidden: Array,
    attention_mask: Array,
    *,
    normalize: Annotated[bool, msgspec.Meta(description="whether vectors get length 1")] = True,
) -> Array:
    """The mean of the token vectors that the mask lets through (as sentence-transformers pools), of length 1."""
    weights = attention_mask[..., None].astype(np.float32)
    mean = (hidden * weights).sum(axis=1) / np.maximum(weights.sum(axis=1), 1e-9)
    if normalize:
        mean /= np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)
    return np.asarray(mean, np.float32)
