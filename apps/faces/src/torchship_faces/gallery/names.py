"""What a person and a group may be called: letters, marks and digits of every script, and what stands between them.

Names are kept composed (Unicode normalization form C), so that a name typed here and the same name out of a macOS
folder, which is decomposed, are one person. Nothing else is folded: `Ann` and `ann` are two.
"""

from __future__ import annotations

import unicodedata

from torchship.errors import BadInput

LONGEST = 200
_ASCII_BETWEEN = frozenset(" .@+-_'&(),")
_APOSTROPHES = frozenset("'\u2018\u2019\u02bc")
_JOINERS = frozenset("\u200c\u200d")  # Persian, Malayalam and Sinhala words need them
_KINDS = frozenset("LMN")
_KINDS_BETWEEN = frozenset(("Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po", "Sk", "Zs"))


def composed(name: str) -> str:
    """The form in which a name is kept and looked up."""
    return unicodedata.normalize("NFC", name)


def checked_person(name: str) -> str:
    """The name of a person, composed. Raises BadInput."""
    found = composed(name)
    if not _is_name(found):
        raise BadInput(
            f"{name[: LONGEST + 20]!r} cannot be the name of a person",
            hint=f"use 1 to {LONGEST} letters, marks and digits of any script, spaces, apostrophes and . _ @ + - & ( ),"
            " beginning with a letter or digit",
        )
    return found


def checked_groups(names: tuple[str, ...]) -> tuple[str, ...]:
    """Names of groups, composed; commas split them where they are written in a row. Raises BadInput."""
    found = tuple(map(composed, names))
    odd = [name for name in found if "," in name or not _is_name(name)]
    if odd:
        raise BadInput(
            f"{odd[0][: LONGEST + 20]!r} cannot be the name of a group",
            hint="groups are called as persons are, without a comma",
        )
    return found


def _is_name(name: str) -> bool:
    if not 1 <= len(name) <= LONGEST:
        return False
    begins = unicodedata.category(name[0])[0] in "LN" or name[0] == "_" or name[0] in _APOSTROPHES
    return begins and all(map(_is_inside, name))


def _is_inside(character: str) -> bool:
    kind = unicodedata.category(character)
    if kind[0] in _KINDS or character in _JOINERS:
        return True
    return character in _ASCII_BETWEEN if character.isascii() else kind in _KINDS_BETWEEN
