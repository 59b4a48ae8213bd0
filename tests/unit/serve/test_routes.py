"""What an application gets by `torchship.serve.routes`: places in paths, queries, JSON and forms."""

from __future__ import annotations

from typing import Any, cast

import pytest

from torchship.errors import BadConfig, BadInput
from torchship.serve.http.exchange import Head
from torchship.serve.http.router import Router
from torchship.serve.routes import Exchange, Route, query_parameters, query_words, read_form, read_json

FORM = (
    b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\nContent-Type: image/png\r\n\r\nAB\r\nC\r\n'
    b'--b\r\nContent-Disposition: form-data; name="groups"\r\n\r\nx,y\r\n--b--\r\n'
)


def asked(body: bytes = b"", *, query: str = "", kind: str = "") -> Exchange:
    return Exchange(cast(Any, None), Head("POST", "/", query, {"content-type": kind}), body)


def test_a_form() -> None:
    assert read_form(asked(FORM, kind="Multipart/Form-Data; boundary=b")) == [("image", b"AB\r\nC"), ("groups", b"x,y")]


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (FORM, "multipart/form-data"),
        (FORM, "text/plain; boundary=b"),
        (FORM[:-8], "multipart/form-data; boundary=b"),
        (FORM.replace(b'name="image"; ', b""), "multipart/form-data; boundary=b"),
        (b"nothing", "multipart/form-data; boundary=b"),
        (b"\r\n".join([FORM[:-9]] * 501) + FORM[-9:], "multipart/form-data; boundary=b"),
    ],
)
def test_what_is_no_form(body: bytes, kind: str) -> None:
    with pytest.raises(BadInput, match="form"):
        read_form(asked(body, kind=kind))


def test_queries_and_json() -> None:
    exchange = asked(b'{"a":[1]}', query="n=3&t=0.5&on=true&word=x+y&n=4")
    assert query_words(exchange.head) == {"n": "4", "t": "0.5", "on": "true", "word": "x y"}
    assert query_parameters(exchange.head) == {"n": 4, "t": 0.5, "on": True, "word": "x y"}
    assert read_json(exchange, dict[str, list[int]]) == {"a": [1]}
    with pytest.raises(BadInput, match="request body"):
        read_json(exchange, dict[str, int])


@pytest.mark.parametrize(
    ("path", "found"),
    [("/p/Zo%C3%AB%20B", {"who": "Zoë B"}), ("/p/a/t/7", {"who": "a", "which": "7"}), ("/p/a/t/7%208", None),
     ("/p/%E5%B1%B1%E3%80%80%E5%A4%AA", {"who": "山\u3000太"}),
     ("/p/%D9%85%E2%80%8C%D8%A7", {"who": "\u0645\u200c\u0627"}),
     ("/p/%E2%80%AEa", None), ("/p/a%0A", None), ("/p/%00", None), ("/p/" + "a" * 201, None)],
)  # fmt: skip
def test_places_of_a_path(path: str, found: dict[str, str] | None) -> None:
    said: list[Any] = []
    pattern = "/p/{who:text}"
    router = Router(Route("GET", each, said.append) for each in (pattern, f"{pattern}/t/{{which}}"))
    head = Head("GET", path, "", {})
    router.resolve(head)
    assert (head.endpoint == said.append) == (found is not None)
    assert head.places == (found or {})
    assert Route("GET", pattern, said.append).path == "/p/{who}"


def test_two_routes_at_one_path_are_refused() -> None:
    with pytest.raises(BadConfig, match=r"GET /p/\{b\} is served already"):
        Router([Route("GET", "/p/{a}", print), Route("GET", "/p/{b}", print)])
