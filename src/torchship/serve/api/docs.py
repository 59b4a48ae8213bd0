"""What is served, for machines and for readers: `GET /openapi.json` and `GET /docs`, with examples that work."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

import msgspec

from torchship.errors import TorchshipError
from torchship.plugins import rendered
from torchship.serve.api.front import Front
from torchship.serve.http.exchange import Exchange
from torchship.serve.http.router import ANY_TEXT, NAME, Route
from torchship.serve.service import Service
from torchship.tensors import FLOATS, numpy_dtype

_HOST = re.compile(r"[A-Za-z0-9.\-:\[\]]{1,255}")
_PICTURE = re.compile("image|picture|photo|frame|jpe?g|png", re.IGNORECASE)
_SMALL = 64  # elements of a tensor that are written out in an example
_KINDS = {bool: "boolean", int: "integer", float: "number", str: "string"}


def docs_routes(front: Front, routes: Iterable[Route]) -> list[Route]:
    """The description, the page, and / that leads to it; `routes` are all else that the port serves."""
    known = sorted(routes, key=lambda route: route.path)

    def page(exchange: Exchange) -> None:
        host = exchange.head.headers.get("host", "")
        base = f"{front.scheme}://{host if _HOST.fullmatch(host) else '127.0.0.1:8000'}"
        curl = "curl -H 'Authorization: Bearer TOKEN'" if front.guarded else "curl"
        found = [model | {"commands": examples(model, curl=curl, base=base)} for model in models(front.service)]
        about = front.service.server_metadata()
        text = rendered("torchship.serve.api", "docs.html", about=about, models=found, routes=known)
        policy = ("content-security-policy", "default-src 'none'; style-src 'unsafe-inline'")
        exchange.answer(text.encode(), content_type="text/html; charset=utf-8", headers=(policy,))

    def lead(exchange: Exchange) -> None:
        exchange.answer(b"see /docs\n", status=302, content_type="text/plain", headers=(("location", "/docs"),))

    return [
        Route("GET", "/openapi.json", lambda exchange: exchange.answer_json(describe(front.service, known))),
        Route("GET", "/docs", page, about="This page."),
        Route("GET", "/", lead, about="Leads to /docs."),
    ]


def models(service: Service) -> list[dict[str, Any]]:
    """The metadata of every model that can be asked now, by name; whether it `streams`, how many inputs it `needs`."""
    found = []
    for name in sorted({entry["name"] for entry in service.repository_index(ready=True)}):
        try:
            needs = sum([not spec.optional for spec in service.inputs(name)])
            found.append(service.model_metadata(name) | {"streams": service.streams(name), "needs": needs})
        except TorchshipError:
            continue  # it went away between the two questions
    return found


@cache
def _skeleton() -> dict[str, Any]:
    """The parts of the OpenAPI document; a text like `$name` stands for a value."""
    found: dict[str, Any] = msgspec.json.decode(files("torchship.serve.api").joinpath("openapi.json").read_bytes())
    return found


def _filled(part: Any, values: Mapping[str, Any]) -> Any:
    """A part of the skeleton with its values."""
    if isinstance(part, dict):
        return {name: _filled(below, values) for name, below in part.items()}
    if isinstance(part, list):
        return [_filled(below, values) for below in part]
    return values[part[1:]] if isinstance(part, str) and part.startswith("$") else part


def describe(service: Service, routes: Iterable[Route]) -> dict[str, Any]:
    """The OpenAPI 3.1 document: one path for each model, with an example that works."""
    paths: dict[str, dict[str, Any]] = {}
    found = models(service)
    for model in found:
        for end, operations in _model_paths(model).items():
            given = {method: {"tags": [model["name"]], **operation} for method, operation in operations.items()}
            paths[f"/v2/models/{model['name']}{end}"] = given
    for route in routes:
        if route.pattern.startswith("/v2/models/{model}") and not route.pattern.endswith("/setting"):
            continue  # told for each model
        paths.setdefault(route.path, {})[route.method.lower()] = _other(route)
    for path, operations in paths.items():
        for method, operation in operations.items():
            operation["operationId"] = f"{method}{re.sub(r'[^A-Za-z0-9]+', '_', path)}"
            operation["description"] = operation["summary"]
            operation["responses"] = _skeleton()["responses"] | operation.get("responses", {})
    tags = [{"name": name} for name in ("server", *(model["name"] for model in found))]
    values = {"version": service.server_metadata()["version"], "tags": tags, "paths": paths}
    document: dict[str, Any] = _filled(_skeleton()["document"], values)
    return document


def _model_paths(model: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The operations of one model by the end of their path."""
    example, inputs = example_body(model), model["inputs"]
    parameters = {
        name: {"type": _KINDS.get(type(about.get("default")), "string"), **about}
        for name, about in model["parameters"].items()
    }
    tensor = _skeleton()["tensor"]
    values = {
        "name": model["name"],
        "parameters": parameters,
        "tensors": [
            _filled(tensor, item | {"shape": str(item["shape"]), "kind": _json_type(item["datatype"])})
            for item in inputs
        ],
        "needs": model["needs"],
        "most": len(inputs),
        "outputs": [item["name"] for item in model["outputs"]],
        "example": example,
    }
    found: dict[str, dict[str, Any]] = _filled(_skeleton()["model"], values)
    if model["streams"]:
        del found["/generate"], found["/infer"]
        return found
    content = found["/infer"]["post"]["requestBody"]["content"]
    if example is None:
        del content["application/json"]["example"]
    if len(inputs) != 1:
        del content["application/octet-stream"]
    return found | {f"/versions/{version}/infer": found["/infer"] for version in model["versions"]}


def _other(route: Route) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "summary": route.about or route.path,
        "tags": ["server"],
        "responses": _skeleton()["anything"],
    }
    places = [part[1:-1] for part in route.pattern.split("/") if part.startswith("{")]
    if places:
        operation["parameters"] = [
            {
                "name": place.removesuffix(":text"),
                "in": "path",
                "required": True,
                "schema": {"type": "string", "pattern": ANY_TEXT if place.endswith(":text") else NAME},
            }
            for place in places
        ]
    if route.method in ("POST", "PUT"):
        operation["requestBody"] = _skeleton()["body"]
    return operation


def _json_type(datatype: str) -> str:
    kind = "number" if datatype in FLOATS else "integer"
    return {"BYTES": "string", "BOOL": "boolean"}.get(datatype, kind)


def example_body(model: dict[str, Any]) -> dict[str, Any] | None:
    """An infer request that fits the model, or None where its tensors are too large to be written out."""
    inputs = []
    for item in model["inputs"]:
        shape = [max(axis, 1) for axis in item["shape"]]
        count = math.prod(shape)
        if count > _SMALL:
            return None
        value: Any = {"string": "text", "boolean": True, "number": 0.5, "integer": 1}[_json_type(item["datatype"])]
        inputs.append({"name": item["name"], "datatype": item["datatype"], "shape": shape, "data": [value] * count})
    known = model.get("parameters", {})
    alone = {"sequence_id": "1", "sequence_start": True, "sequence_end": True}  # a sequence of one request
    parameters = {name: value for name, value in alone.items() if name in known and "sequence_id" in known}
    return {"inputs": inputs} | ({"parameters": parameters} if parameters else {})


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
        size = math.prod(max(axis, 1) for axis in inputs[0]["shape"]) * numpy_dtype(inputs[0]["datatype"]).itemsize
        commands.append(
            f"head -c {size} /dev/zero | {curl} --data-binary @- -H 'Content-Type: application/octet-stream' {url}"
        )
    else:  # large tensors for several inputs: made by Python, sent by curl
        shapes = [(item["name"], item["datatype"], [max(axis, 1) for axis in item["shape"]]) for item in inputs]
        made = (
            "import json,math;print(json.dumps({'inputs':[{'name':n,'datatype':d,'shape':s,"
            "'data':['' if d=='BYTES' else 0]*math.prod(s)} for n,d,s in "
            f"{shapes!r}]}}))"
        )
        commands.append(f"python3 -c \"{made}\" | {curl} -H 'Content-Type: application/json' -d @- {url}")
    return commands
