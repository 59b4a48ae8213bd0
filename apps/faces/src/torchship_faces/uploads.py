"""Pictures out of a request's body: the bytes themselves, a form with files, or JSON with base64."""

from __future__ import annotations

from typing import Any

import msgspec

from torchship.errors import BadInput
from torchship.serve.routes import Exchange, content_type, read_form, read_json

_KINDS = "send the bytes of a picture (image/jpeg ...), multipart/form-data, or JSON with base64"


class Upload(msgspec.Struct):
    """What JSON bodies may hold. Pictures are base64."""

    image: bytes = b""
    images: list[bytes] = []
    first: bytes = b""
    second: bytes = b""
    groups: list[str] = []
    about: dict[str, str] = {}
    parameters: dict[str, Any] = {}


def read_upload(exchange: Exchange) -> Upload:
    """The body as an Upload; `images` holds every picture that is neither `first` nor `second`. Raises BadInput."""
    kind, body = content_type(exchange), bytes(exchange.body)
    if kind == "multipart/form-data":
        found = _form(read_form(exchange))
    elif kind == "application/json":
        found = read_json(exchange, Upload)
    elif body and (kind.startswith("image/") or kind in ("", "application/octet-stream")):
        found = Upload(image=body)
    elif not body:
        raise BadInput("the body is empty", hint=_KINDS)
    else:
        raise BadInput(f"cannot read a body of type {kind[:60]!r}", hint=_KINDS)
    if found.image:
        found.images.insert(0, found.image)
    return found


def _form(parts: list[tuple[str, bytes]]) -> Upload:
    found = Upload()
    for name, content in parts:
        if name in ("first", "second"):
            setattr(found, name, content)
        elif name in ("image", "images"):
            found.images.append(content)
        elif name == "groups":
            found.groups += [word for word in content.decode(errors="replace").split(",") if word]
        else:
            found.about[name] = content.decode(errors="replace")[:1000]
    return found
