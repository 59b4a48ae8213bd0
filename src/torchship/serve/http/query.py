"""The query of a request's path as request parameters."""

from __future__ import annotations

from urllib.parse import parse_qs

import msgspec

from torchship.stage import Value


def words(query: str) -> dict[str, str]:
    """Name to text; of a name that is there twice, the last."""
    return {name: values[-1] for name, values in parse_qs(query).items()}


def parameters(query: str) -> dict[str, Value]:
    """The query as parameters: true and false, whole numbers, numbers, else text."""
    found: dict[str, Value] = {}
    for name, text in words(query).items():
        try:
            value = msgspec.json.decode(text)
        except msgspec.MsgspecError:
            value = text
        found[name] = value if isinstance(value, bool | int | float) else text
    return found
