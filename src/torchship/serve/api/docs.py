"""`GET /docs`: a page without anything from elsewhere, with a command for each model that can be pasted."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import Any

from torchship.plugins import rendered
from torchship.serve.api.front import Front
from torchship.serve.api.openapi import example_body, models
from torchship.serve.http.exchange import Exchange
from torchship.serve.http.router import Route

_HOST = re.compile(r"[A-Za-z0-9.\-:\[\]]{1,255}")
_PICTURE = re.compile("image|picture|photo|frame|jpe?g|png", re.IGNORECASE)
_SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}


def docs_routes(front: Front, routes: Iterable[Route]) -> list[Route]:
    """The page, and / that leads to it."""
    known = [*routes]

    def page(exchange: Exchange) -> None:
        host = exchange.head.headers.get("host", "")
        text = render(front, known, host=host if _HOST.fullmatch(host) else "127.0.0.1:8000")
        policy = ("content-security-policy", "default-src 'none'; style-src 'unsafe-inline'")
        exchange.answer(text.encode(), content_type="text/html; charset=utf-8", headers=(policy,))

    def lead(exchange: Exchange) -> None:
        exchange.answer(b"see /docs\n", status=302, content_type="text/plain", headers=(("location", "/docs"),))

    return [Route("GET", "/docs", page, about="This page."), Route("GET", "/", lead, about="Leads to /docs.")]


def render(front: Front, routes: list[Route], *, host: str) -> str:
    """The page as HTML."""
    curl = "curl -H 'Authorization: Bearer TOKEN'" if front.guarded else "curl"
    found = [
        model | {"commands": examples(model, curl=curl, base=f"{front.scheme}://{host}")}
        for model in models(front.service)
    ]
    known = sorted(routes, key=lambda route: route.path)
    about = front.service.server_metadata()
    return rendered("torchship.serve.api", "docs.html", about=about, models=found, routes=known)


def examples(model: dict[str, Any], *, curl: str = "curl", base: str) -> list[str]:
    """Commands that ask the model, to be pasted into a terminal. `base` is the server's URL."""
    url = f"{base}/v2/models/{model['name']}/infer"
    body = example_body(model)
    inputs = model["inputs"]
    if model.get("streams"):
        fields = {item["name"]: item["data"] for item in (body or {"inputs": []})["inputs"]}
        return [f"{curl} -N -d '{json.dumps(fields)}' {url.removesuffix('infer')}generate_stream"]
    commands = []
    if len(inputs) == 1 and inputs[0]["datatype"] == "BYTES" and _PICTURE.search(inputs[0]["name"]):
        commands.append(f"{curl} --data-binary @picture.jpg -H 'Content-Type: image/jpeg' {url}")
    if body is not None:
        text = json.dumps(body, separators=(",", ":")).replace("'", "\\u0027")
        commands.append(f"{curl} -H 'Content-Type: application/json' -d '{text}' {url}")
    elif len(inputs) == 1:
        size = math.prod(max(axis, 1) for axis in inputs[0]["shape"]) * _item_size(inputs[0]["datatype"])
        commands.append(
            f"head -c {size} /dev/zero | {curl} --data-binary @- -H 'Content-Type: application/octet-stream' {url}"
        )
    else:
        commands.append(_script(inputs, url, curl))
    return commands


def _item_size(datatype: str) -> int:
    return next((size for bits, size in _SIZES.items() if datatype.endswith(bits)), 1)


def _script(inputs: list[dict[str, Any]], url: str, curl: str) -> str:
    """Large tensors for several inputs: made by Python, sent by curl."""
    shapes = [(item["name"], item["datatype"], [max(axis, 1) for axis in item["shape"]]) for item in inputs]
    made = (
        "import json,math;print(json.dumps({'inputs':[{'name':n,'datatype':d,'shape':s,"
        "'data':['' if d=='BYTES' else 0]*math.prod(s)} for n,d,s in "
        f"{shapes!r}]}}))"
    )
    return f"python3 -c \"{made}\" | {curl} -H 'Content-Type: application/json' -d @- {url}"
