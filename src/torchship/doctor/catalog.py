"""The doctor's catalog: what stops an export, what is odd about a module, what fails at run time, what hardware can do.

The rows lie in `catalog.toml`; a construct is added by adding one, with a case that the tests run.
"""

from __future__ import annotations

import re
import tomllib
from functools import cache
from importlib import resources
from typing import Literal, TypeAlias

import msgspec

Level: TypeAlias = Literal["info", "warn", "bad"]
PACKAGES = ("torch", "torchvision", "onnx", "onnxruntime", "openvino", "nncf", "torchao", "executorch", "tensorrt")
UNKNOWN = "unknown"  # the construct that takes what no other does


class RowTest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What shows a row: a `Model` whose line at fault ends in `# FAULT`, refused by `route` (only read, where that is
    empty), or the `text` of an error or a log, at a line of `code`.
    """

    source: str = ""
    route: str = ""
    text: str = ""
    code: str = ""


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One thing that the doctor knows.

    Any of `pattern` is searched in the text of an error or of a log, `code` (where given) in the user's line, and
    `source` in what `doctor.source` makes of each statement of a forward. `why` and `fix` are told of what failed,
    `seen` with its `level` of what did not fail yet. `freezes`: a trace takes it without a word, and answers wrongly;
    `tells_lengths`: exporters say in their error which lengths they would take. `rewrite` names a function of
    `doctor.edits`; `key` tells rows of one name apart.
    """

    name: str
    key: str = ""
    pattern: list[str] = []
    code: str = ""
    source: str = ""
    why: str = ""
    fix: list[str] = []
    seen: str = ""
    level: Level = "info"
    freezes: bool = False
    tells_lengths: bool = False
    rewrite: str = ""
    test: RowTest | None = None

    @property
    def edit(self) -> str:
        """What to do, in one line."""
        return "; ".join(self.fix)

    def search(self, text: str, flags: re.RegexFlag = re.NOFLAG) -> re.Match[str] | None:
        """The first place in a text that speaks of this kind."""
        return re.search("|".join(self.pattern), text, flags) if self.pattern else None

    def fits(self, text: str, code: str) -> bool:
        """Whether an error with this text at this line is of this kind."""
        return bool(self.search(text, re.I) and re.search(self.code, code))


class CardPackage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A package that a machine with a card may lack, what it `brings`, and the words after `pip install`; told only
    where the package `beside` is installed, if one is named."""

    package: str
    brings: str
    pip: str
    beside: str = ""


class DoctorTables(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All tables of `catalog.toml`, as it describes them."""

    shared: dict[str, list[str]]
    construct: list[Row]
    finding: list[Row]
    failure: list[Row]
    card: list[CardPackage]
    routes: dict[str, str]
    advice: dict[str, str]
    features: dict[str, dict[str, str]]
    fast: dict[str, list[str]]
    capability: dict[str, float]


@cache
def tables() -> DoctorTables:
    """The catalog, read once."""
    text = resources.files(__package__).joinpath("catalog.toml").read_text()
    return msgspec.convert(tomllib.loads(text), DoctorTables)


@cache
def constructs() -> dict[str, Row]:
    """The constructs by name, in the order in which they are tried."""
    shared = tables().shared
    return {
        row.name: msgspec.structs.replace(
            row, pattern=[mark for word in row.pattern for mark in shared.get(word, [word])]
        )
        for row in tables().construct
    }


def recognise(text: str, code: str) -> Row:
    """The first construct whose marks are in the error's text and in the user's line."""
    return next(row for row in constructs().values() if row.fits(text, code))
