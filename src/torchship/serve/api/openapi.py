"""What is served, as an OpenAPI 3.1 description: one path for each model, with an example that works."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

from torchship.errors import TorchshipError
from torchship.serve.api.front import Front
from torchship.serve.http.exchange import Exchange
from torchship.serve.http.router import ANY_TEXT, NAME, Route
from torchship.serve.service import Service

_SMALL = 64  # elements of a tensor that are written out in an example
_OBJECT = {"type": "object"}
_ERROR = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
_FAULTS = {
    "400": "The request is wrong, or this server does not do that; `error` says what and where.",
    "401": "A valid token is needed.",
    "403": "The token does not allow this.",
    "404": "There is no such model or version.",
    "413": "The body is too large.",
    "415": "The body has a coding that is not understood.",
    "503": "Not now: the line is full, late, or not ready.",
}


def openapi_route(front: Front, routes: Iterable[Route]) -> Route:
    """`GET /openapi.json`; `routes` are all that the port serves."""
    known = [*routes]
    return Route("GET", "/openapi.json", lambda exchange: _answer(exchange, front, known))


def _answer(exchange: Exchange, front: Front, routes: list[Route]) -> None:
    exchange.answer_json(describe(front.service, routes))


def models(service: Service) -> list[dict[str, Any]]:
    """The metadata of every model that can be asked now, by name; whether it `streams`, how many inputs it `needs`."""
    found = []
    for name in sorted({entry["name"] for entry in service.repository_index(ready=True)}):
        try:
            config = service.model_config(name)
            policy = config.get("model_transaction_policy", {})
            needs = sum([not item.get("optional", False) for item in config["input"]])
            found.append(service.model_metadata(name) | {"streams": bool(policy.get("decoupled")), "needs": needs})
        except TorchshipError:
            continue  # it went away between the two questions
    return found


def describe(service: Service, routes: Iterable[Route]) -> dict[str, Any]:
    """The OpenAPI document."""
    paths: dict[str, dict[str, Any]] = {}
    found = models(service)
    for model in found:
        for path, method, operation in _model_paths(model):
            paths.setdefault(path, {})[method] = operation
    for route in routes:
        if route.pattern.startswith("/v2/models/{model}") and not route.pattern.endswith("/setting"):
            continue  # told for each model
        paths.setdefault(route.path, {})[route.method.lower()] = _other(route)
    for path, operations in paths.items():
        for method, operation in operations.items():
            operation["operationId"] = f"{method}{re.sub(r'[^A-Za-z0-9]+', '_', path)}"
    about = service.server_metadata()
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "torchship",
            "version": about["version"],
            "description": "Open Inference Protocol v2 with Triton's extensions.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": name} for name in ("server", *(model["name"] for model in found))],
        "paths": paths,
        "components": {"schemas": {"Error": _ERROR}},
    }


def _model_paths(model: dict[str, Any]) -> Iterable[tuple[str, str, dict[str, Any]]]:
    base = f"/v2/models/{model['name']}"
    yield base, "get", _operation("The model's inputs, outputs and parameters.", model)
    yield f"{base}/ready", "get", _operation("Whether it answers now.", model)
    yield f"{base}/config", "get", _operation("Its configuration.", model)
    yield f"{base}/stats", "get", _operation("How often and how long it ran.", model)
    yield f"{base}/generate_stream", "post", _generate(model, "Every answer as a server-sent event.")
    if model.get("streams"):
        return
    yield f"{base}/generate", "post", _generate(model, "One inference with plain JSON.")
    for path in (f"{base}/infer", *(f"{base}/versions/{version}/infer" for version in model.get("versions", ()))):
        infer = _operation("One inference.", model)
        infer["requestBody"] = {"required": True, "content": _bodies(model)}
        infer["responses"]["200"]["content"]["application/json"]["schema"] = _answer_schema(model)
        yield path, "post", infer


def _operation(summary: str, model: dict[str, Any] | None = None) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    responses: dict[str, Any] = {"200": {"description": "Done.", "content": {"application/json": {"schema": {}}}}}
    responses |= {status: {"description": text, "content": error} for status, text in _FAULTS.items()}
    return {
        "summary": summary,
        "description": summary,
        "responses": responses,
        "tags": [model["name"] if model else "server"],
    }


def _other(route: Route) -> dict[str, Any]:
    operation = _operation(route.about or route.path)
    operation["responses"]["200"]["content"] = {"*/*": {"schema": {}}}
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
        operation["requestBody"] = {"required": False, "content": {"application/json": {"schema": _OBJECT}}}
    return operation


def _generate(model: dict[str, Any], summary: str) -> dict[str, Any]:
    operation = _operation(summary, model)
    operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": _OBJECT}}}
    operation["responses"]["200"]["content"] = {"*/*": {"schema": {}}}
    return operation


def _bodies(model: dict[str, Any]) -> dict[str, Any]:
    json: dict[str, Any] = {"schema": _question_schema(model)}
    example = example_body(model)
    if example is not None:
        json["example"] = example
    bodies: dict[str, Any] = {"application/json": json}
    if len(model["inputs"]) == 1:
        bodies["application/octet-stream"] = {"schema": {"type": "string", "format": "binary"}}
    return bodies


def _question_schema(model: dict[str, Any]) -> dict[str, Any]:
    tensors = [
        {
            "type": "object",
            "required": ["name", "shape", "datatype", "data"],
            "properties": {
                "name": {"const": item["name"]},
                "datatype": {"const": item["datatype"]},
                "shape": {
                    "type": "array",
                    "items": {"type": "integer", "minimum": 0},
                    "description": str(item["shape"]),
                },
                "data": {"type": "array", "items": {"type": _json_type(item["datatype"])}},
            },
        }
        for item in model["inputs"]
    ]
    return {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "id": {"type": "string"},
            "parameters": {"type": "object", "properties": _parameters(model)},
            "inputs": {
                "type": "array",
                "items": {"oneOf": tensors},
                "minItems": model["needs"],
                "maxItems": len(tensors),
            },
            "outputs": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["name"],
                    "properties": {"name": {"enum": [item["name"] for item in model["outputs"]]}},
                },
            },
        },
    }


def _parameters(model: dict[str, Any]) -> dict[str, Any]:
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string"}
    found = {}
    for name, about in model.get("parameters", {}).items():
        known = {key: about[key] for key in ("default", "minimum", "maximum", "description") if key in about}
        found[name] = {"type": kinds.get(type(about.get("default")), "string"), **known}
    return found


def _answer_schema(model: dict[str, Any]) -> dict[str, Any]:
    output = {
        "type": "object",
        "required": ["name", "shape", "datatype"],
        "properties": {
            "name": {"enum": [item["name"] for item in model["outputs"]]},
            "datatype": {"type": "string"},
            "shape": {"type": "array", "items": {"type": "integer"}},
            "data": {"type": "array", "items": {}},
        },
    }
    return {
        "type": "object",
        "required": ["model_name", "outputs"],
        "properties": {
            "model_name": {"const": model["name"]},
            "model_version": {"type": "string"},
            "id": {"type": "string"},
            "outputs": {"type": "array", "items": output},
        },
    }


def _json_type(datatype: str) -> str:
    if datatype in ("BYTES", "BOOL"):
        return {"BYTES": "string", "BOOL": "boolean"}[datatype]
    return "number" if datatype.startswith(("FP", "BF")) else "integer"


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
