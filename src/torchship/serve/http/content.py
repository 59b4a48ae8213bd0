"""What a request holds: the query of its path, a JSON object or a form in its body."""

from __future__ import annotations

from io import BytesIO
from threading import Event
from typing import Any, TypeVar, cast
from urllib.parse import parse_qs

import msgspec

from torchship.errors import BadInput
from torchship.serve.http.exchange import Exchange, Head
from torchship.stage import Value

T = TypeVar("T")
_MOST_PARTS = 1000


def query_words(head: Head) -> dict[str, str]:
    """The query as name to text; of a name that is there twice, the last."""
    return {name: values[-1] for name, values in parse_qs(head.query).items()}


def query_parameters(head: Head) -> dict[str, Value]:
    """The query as request parameters: true and false, whole numbers, numbers, else text."""
    found: dict[str, Value] = {}
    for name, text in query_words(head).items():
        try:
            value = msgspec.json.decode(text)
        except msgspec.MsgspecError:
            value = text
        found[name] = value if isinstance(value, bool | int | float) else text
    return found


def read_json(exchange: Exchange, kind: type[T]) -> T:
    """The body as JSON of a type that msgspec knows; bytes are base64. Raises BadInput."""
    try:
        return msgspec.json.decode(exchange.body, type=kind)
    except (msgspec.MsgspecError, RecursionError, ValueError) as fault:
        raise BadInput(f"the request body is not what is expected here: {fault}") from None


def json_object(exchange: Exchange) -> dict[str, Any]:
    """The body as a JSON object; an empty body is an empty one. Raises BadInput."""
    return read_json(exchange, dict[str, Any]) if len(exchange.body) else {}


def content_type(exchange: Exchange) -> str:
    """What the body is, in lower case and without options: `image/jpeg`."""
    return exchange.head.headers.get("content-type", "").partition(";")[0].strip().lower()


def read_form(exchange: Exchange) -> list[tuple[str, bytes]]:
    """The parts of a multipart/form-data body (RFC 7578) as name and content, in their order. Raises BadInput."""
    from python_multipart.exceptions import FormParserError
    from python_multipart.multipart import FormParser, parse_options_header

    kind, options = parse_options_header(exchange.head.headers.get("content-type", ""))
    found: list[tuple[str, bytes]] = []
    ended, body = Event(), bytes(exchange.body)

    def add(name: bytes | None, content: bytes | None) -> None:
        if len(found) >= _MOST_PARTS:
            raise BadInput(f"the form has more than {_MOST_PARTS} parts")
        found.append(((name or b"").decode(errors="replace"), content or b""))

    try:
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise BadInput("the body is no form with a boundary", hint="curl -F image=@picture.jpg URL")
        parser = FormParser(
            kind.decode(),
            lambda field: add(field.field_name, field.value),
            lambda file: add(file.field_name, cast(BytesIO, file.file_object).getvalue()),
            ended.set,
            boundary=options[b"boundary"],
            config={"MAX_MEMORY_FILE_SIZE": 1 << 62},  # the body is in memory, and bounded, already
        )
        parser.write(body)
        parser.finalize()
        if b"\r\n" in body and not ended.is_set():  # a part has begun
            raise BadInput("the form ends too early", hint="it ends with its boundary and two dashes")
    except FormParserError as fault:
        raise BadInput(f"the form cannot be read: {fault}") from None
    return found
