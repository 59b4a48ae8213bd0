"""Text in, tokens out, and token vectors to one vector a text: what sentence encoders such as MiniLM need."""

from __future__ import annotations

import math
from typing import Annotated, Any

import msgspec
import numpy as np

from torchship import textfiles
from torchship.errors import BadConfig, BadInput, Unavailable
from torchship.stage import stage
from torchship.tensors import Array

_PADS = ("[PAD]", "<pad>")  # what pads are called where the file does not say it
_MAX_LENGTH = 256


def _settings(text: str, max_length: int, multiple: int) -> tuple[dict[str, Any], int, int, int]:
    """What a tokenizer.json says of padding; and in tokens the longest text, the length that each has at least, and
    what lengths are multiples of. Options go before it. Raises BadConfig."""
    try:
        found = msgspec.json.decode(text, type=dict[str, Any])
        padding, truncation = found.get("padding") or {}, found.get("truncation") or {}
        strategy = padding.get("strategy")
        fixed = strategy["Fixed"] if isinstance(strategy, dict) else 0
        multiple = math.lcm(multiple, padding.get("pad_to_multiple_of") or 1)
        return padding, max_length or truncation.get("max_length", _MAX_LENGTH), fixed, multiple
    except (msgspec.MsgspecError, KeyError, TypeError, AttributeError) as fault:
        raise BadConfig(f"the tokenizer: {fault}", hint="give a tokenizer.json of the tokenizers library") from None


def _rounded(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


@stage("text:BYTES[-1] -> input_ids:INT64[-1,tokens], attention_mask:INT64[-1,tokens], token_type_ids:INT64[-1,tokens]")
class Tokenize:
    """Texts (UTF-8) to token ids with the tokenizer in `tokenizer`, a `tokenizer.json` of the tokenizers library.

    What the file says of padding (side, id, type id, fixed length, multiple), truncation (side, length) and templates
    is followed. `max_length` replaces its length (256 where it has none): what is longer is cut off. All texts of a job
    are as long as its longest, rounded up to a multiple of `multiple`, so that jobs of about one length meet in one
    batch; a text of more than `max_bytes` is refused. Raises BadInput naming the row.
    """

    def __init__(self, *, tokenizer: str, max_length: int = 0, multiple: int = 16, max_bytes: int = 100_000) -> None:
        if max_length < 0 or multiple < 1:
            raise BadConfig("max_length and multiple must be positive")
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise Unavailable("tokens need the package tokenizers", hint="pip install tokenizers") from None
        text = textfiles.read(tokenizer)
        try:
            self._tokenizer = Tokenizer.from_str(text)
        except Exception as fault:  # the library raises plain Exception
            raise BadConfig(f"{tokenizer}: {fault}", hint="give a tokenizer.json of the tokenizers library") from None
        made = self._tokenizer
        padding, longest, self._fixed, self._multiple = _settings(text, max_length, multiple)
        special = made.num_special_tokens_to_add(False)
        if longest <= special:
            raise BadConfig(f"max_length is {longest}, the tokenizer adds {special}", hint="make it larger")
        made.enable_truncation(longest, direction=(made.truncation or {}).get("direction", "right"))
        made.no_padding()
        known = (made.token_to_id(token) for token in _PADS)
        self._pad = padding.get("pad_id", next((number for number in known if number is not None), 0))
        self._pad_type, self._left = padding.get("pad_type_id", 0), padding.get("direction") == "Left"
        self._max_bytes = max_bytes

    @classmethod
    def declare(cls, *, tokenizer: str = "", max_length: int = 0, multiple: int = 16, **_: object) -> str:
        """The signature for these options. Raises BadConfig, NotFound for a `tokenizer` that cannot be read."""
        _, longest, fixed, multiple = _settings(textfiles.read(tokenizer) if tokenizer else "{}", max_length, multiple)
        most = _rounded(max(longest, fixed), multiple)
        names = ("input_ids", "attention_mask", "token_type_ids")
        return "text:BYTES[-1] -> " + ", ".join(f"{name}:INT64[-1,tokens:1..{most}]" for name in names)

    def __call__(self, text: Array) -> tuple[Array, Array, Array]:
        found = self._tokenizer.encode_batch([self._text(item, row) for row, item in enumerate(text.tolist())])
        length = _rounded(max(self._fixed, 1, *(len(one.ids) for one in found)), self._multiple)
        ids = np.full((len(found), length), self._pad, np.int64)
        mask, types = np.zeros_like(ids), np.full_like(ids, self._pad_type)
        for row, one in enumerate(found):
            count = len(one.ids)
            place = slice(length - count, length) if self._left else slice(count)
            ids[row, place], mask[row, place], types[row, place] = one.ids, one.attention_mask, one.type_ids
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
