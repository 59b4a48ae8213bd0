"""Where frames come from, told by an address; each source is decoded in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias

SCHEMES = ("rtsp", "rtsps", "http", "https", "rtmp", "rtp", "srt", "tcp", "udp")

Kind: TypeAlias = Literal["rtsp", "http", "v4l2", "pictures", "file"]


def kind_of(source: str) -> Kind:
    """What a source is, by its address."""
    if source.startswith(("rtsp://", "rtsps://")):
        return "rtsp"
    if "://" in source:
        return "http"
    if source.startswith("/dev/"):
        return "v4l2"
    return "pictures" if Path(source).is_dir() else "file"


def is_live(source: str) -> bool:
    """Whether its end is a lost connection."""
    return kind_of(source) in ("rtsp", "http", "v4l2")
