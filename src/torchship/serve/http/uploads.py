"""Pictures out of a request's body: the bytes themselves, a form with files, or JSON with base64."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from torchship.errors import BadInput
from torchship.serve.http.exchange import Exchange

_BOUNDARY = re.compile(r'boundary="?([^";,]{1,70})"?')
_FIELD = re.compile(rb'name="([^"\r\n]{1,64})"')
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


def read(exchange: Exchange) -> Upload:
    """The body as an Upload; `images` holds every picture that is neither `first` nor `second`. Raises BadInput."""
    kind = exchange.head.headers.get("content-type", "").strip().lower()
    body = bytes(exchange.body)
    if kind.startswith("multipart/form-data"):
        found = _form(body, exchange.head.headers["content-type"])
    elif kind.startswith("application/json"):
        try:
            found = msgspec.json.decode(body, type=Upload)
        except msgspec.MsgspecError as fault:
            raise BadInput(f"the body is not what is expected here: {fault}", hint=_KINDS) from None
    elif body and (kind.startswith("image/") or kind in ("", "application/octet-stream")):
        found = Upload(image=body)
    elif not body:
        raise BadInput("the body is empty", hint=_KINDS)
    else:
        raise BadInput(f"cannot read a body of type {kind[:60]!r}", hint=_KINDS)
    if found.image:
        found.images.insert(0, found.image)
    return found


def _form(body: bytes, kind: str) -> Upload:
    boundary = _BOUNDARY.search(kind)
    if boundary is None:
        raise BadInput("the form has no boundary", hint="curl -F image=@picture.jpg URL")
    found = Upload()
    for part in (b"\r\n" + body).split(b"\r\n--" + boundary[1].encode())[1:]:
        head, split, content = part.partition(b"\r\n\r\n")
        name = _FIELD.search(head)
        if not split or name is None:
            continue
        field = name[1].decode(errors="replace")
        if field in ("first", "second"):
            setattr(found, field, content)
        elif field in ("image", "images"):
            found.images.append(content)
        elif field == "groups":
            found.groups += [word for word in content.decode(errors="replace").split(",") if word]
        else:
            found.about[field] = content.decode(errors="replace")[:1000]
    return found
