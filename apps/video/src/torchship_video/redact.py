"""Addresses without what is secret in them, for logs and answers."""

from __future__ import annotations

import re

_SECRET = re.compile(r"(?<=://)[^/@\s]*@")


def redacted(text: str) -> str:
    """The same text with `***@` where addresses in it hold a user or a password."""
    return _SECRET.sub("***@", text)
