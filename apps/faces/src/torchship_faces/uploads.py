"""Pictures out of a request's body: the bytes themselves, a form with files, or JSON with base64."""

from __future__ import annotations

import base64
import binascii
import re
from typing import Any

import msgspec

from torchship.errors import BadInput
from torchship.serve.routes import Exchange, content_type, read_form, read_json

_KINDS = "send the bytes of a picture (image/jpeg ...), multipart/form-data, or JSON with base64"


_DATA_URL = re.compile(r"\s*data:[^,]{0,200};base64,", re.IGNORECASE)
_URL_SAFE = str.maketrans("-_", "+/")


class JsonUpload(msgspec.Struct):
    """What JSON bodies may hold. Pictures are base64: see `picture_of`."""

    image: str = ""
    images: list[str] = []
    first: str = ""
    second: str = ""
    groups: list[str] = []
    about: dict[str, str] = {}
    parameters: dict[str, Any] = {}


class Upload(msgspec.Struct):
    """What came with a request, whichever way; `images` are all pictures that are neither `first` nor `second`."""

    images: list[bytes] = []
    first: bytes = b""
    second: bytes = b""
    groups: list[str] = []
    about: dict[str, str] = {}
    parameters: dict[str, Any] = {}


def read_upload(exchange: Exchange) -> Upload:
    """The body as an Upload. Raises BadInput."""
    kind, body = content_type(exchange), bytes(exchange.body)
    if kind == "multipart/form-data":
        return form_upload(read_form(exchange))
    if kind == "application/json":
        given = read_json(exchange, JsonUpload)
        one = picture_of(given.image, where="$.image")
        more = [picture_of(text, where=f"$.images[{number}]") for number, text in enumerate(given.images)]
        first, second = picture_of(given.first, where="$.first"), picture_of(given.second, where="$.second")
        return Upload([one, *more] if one else more, first, second, given.groups, given.about, given.parameters)
    if not body:
        raise BadInput("the body is empty", hint=_KINDS)
    if not kind.startswith("image/") and kind not in ("", "application/octet-stream"):
        raise BadInput(f"cannot read a body of type {kind[:60]!r}", hint=_KINDS)
    return Upload([body])


def picture_of(text: str, *, where: str) -> bytes:
    """Bytes out of base64 (RFC 4648): with line ends, in the alphabet for URLs, without padding, or in a data: URL.

    Raises BadInput naming the field and what is no base64 in it.
    """
    bare = "".join(text[found.end() if (found := _DATA_URL.match(text)) else 0 :].split()).translate(_URL_SAFE)
    try:
        return base64.b64decode(bare.rstrip("=") + "=" * (-len(bare.rstrip("=")) % 4), validate=True)
    except (binascii.Error, ValueError) as fault:
        raise BadInput(f"{where} is not base64: {fault}", hint="the bytes of the picture in base64") from None


def form_upload(parts: list[tuple[str, bytes]]) -> Upload:
    """The parts of a form as an Upload: pictures by any name, `first` and `second`, `groups`, and what is told."""
    found = Upload()
    for name, content in parts:
        if name in ("first", "second"):
            setattr(found, name, content)
        elif name in ("image", "images") or not _is_text(content):
            found.images.append(content)  # whatever the field is called: pictures are no text
        elif name == "groups":
            found.groups += group_names(content.decode())
        else:
            found.about[name] = content.decode()[:1000]
    return found


def _is_text(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def group_names(text: str) -> list[str]:
    """Names split by commas."""
    return [name for part in text.split(",") if (name := part.strip())]
