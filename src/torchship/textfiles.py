"""Text files as editors and tools write them: byte order marks, UTF-16, any system's line ends, below `~`."""

from __future__ import annotations

import codecs
import os
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torchship import home
from torchship.errors import BadConfig, NotFound

_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)


def decode(data: bytes, *, where: str) -> str:
    """The text of a file, its lines ended by one newline each: what its byte order mark says, else UTF-8.

    A Windows code page is never guessed: one would read another's letters wrongly. Raises BadConfig naming the line.
    """
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as fault:
        line, what = data.count(b"\n", 0, fault.start) + 1, data[fault.start : fault.start + 1].hex()
        raise BadConfig(f"{where}: line {line} is not {encoding} (byte {what})", hint="save it as UTF-8") from None
    if "\0" in text:
        raise BadConfig(f"{where} is no text file: it holds zero bytes", hint="save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read(path: Path | str) -> str:
    """The text of a file of the user's. Raises NotFound, BadConfig."""
    try:
        return decode(home.expand(path).read_bytes(), where=str(path))
    except FileNotFoundError:
        raise NotFound(f"no file {path}") from None
    except OSError as fault:
        raise BadConfig(f"{path} cannot be read: {fault.strerror}") from None


def read_toml(path: Path | str) -> dict[str, Any]:
    """The tables of a TOML file, with whole paths for those that begin with `~`. Raises NotFound, BadConfig."""
    try:
        tables: dict[str, Any] = with_texts(tomllib.loads(read(path)), _placed)
    except tomllib.TOMLDecodeError as fault:
        raise BadConfig(f"{path}: not TOML: {fault}") from None
    return tables


def with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Plain data with every text in it changed, also in lists and tables."""
    if isinstance(value, Mapping):
        return {name: with_texts(item, change) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [with_texts(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def _placed(text: str) -> str:
    return os.path.expanduser(text) if text.startswith("~") and "/" in text else text  # `~` alone may be a label
