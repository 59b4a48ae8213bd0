"""Asks a served model over the Open Inference Protocol by REST, with binary tensors both ways."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

import msgspec

from torchship.errors import BadInput, NotFound, StageFailed, Unavailable
from torchship.stage import Value
from torchship.tensors import Array, Axis, Free, Signature, Tensors, TensorSpec, dtype_name
from torchship.wire.raw import decode_raw, encode_raw

_LENGTH = "Inference-Header-Content-Length"


class ServedModel:
    """A model at a URL such as `http://host:8000/v2/models/name` (or `http://host:8000/name`)."""

    def __init__(self, url: str, *, timeout: float = 60.0) -> None:
        """Asks for the model's metadata. Raises Unavailable, NotFound."""
        base, _, name = url.rstrip("/").rpartition("/")
        self._url = url.rstrip("/") if "/v2/models/" in url else f"{base}/v2/models/{name}"
        self._timeout = timeout
        if base.count("/") < 2:
            raise BadInput(f"{url} names no model", hint="as in http://127.0.0.1:8000/v2/models/classify")
        facts = msgspec.json.decode(self._get(self._url)[0])
        inputs, outputs = (tuple(map(_spec, facts.get(side, ()))) for side in ("inputs", "outputs"))
        self.signature = Signature(inputs, outputs, batched=False)

    def __call__(self, tensors: Tensors, parameters: Mapping[str, Value] = {}) -> dict[str, Array]:
        """One answer. Raises BadInput, StageFailed, Unavailable with the server's own words."""
        blobs = {name: encode_raw(array) for name, array in tensors.items()}
        question = {
            "inputs": [
                {
                    "name": name,
                    "datatype": dtype_name(array.dtype),
                    "shape": list(array.shape),
                    "parameters": {"binary_data_size": len(blobs[name])},
                }
                for name, array in tensors.items()
            ],
            "parameters": {"binary_data_output": True, **parameters},
        }
        head = msgspec.json.encode(question)
        body = b"".join([head, *blobs.values()])
        headers = {_LENGTH: str(len(head)), "Content-Type": "application/octet-stream"}
        return _answer(*self._get(f"{self._url}/infer", body, headers))

    def _get(self, url: str, body: bytes | None = None, headers: dict[str, str] = {}) -> tuple[bytes, int | None]:
        if not url.startswith(("http://", "https://")):
            raise BadInput(f"{url} is not an http(s) URL")
        request = urllib.request.Request(url, body, headers)  # noqa: S310  # the scheme was checked
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as response:  # noqa: S310
                length = response.headers.get(_LENGTH)
                return response.read(), int(length) if length else None
        except urllib.error.HTTPError as fault:
            raise _refusal(fault) from None
        except (urllib.error.URLError, OSError) as fault:
            reason = getattr(fault, "reason", fault)
            raise Unavailable(f"{url}: {reason}", hint="is the server running?") from None


def _refusal(fault: urllib.error.HTTPError) -> Exception:
    body = fault.read()
    try:
        words = str(msgspec.json.decode(body)["error"])
    except (msgspec.MsgspecError, KeyError, TypeError):
        words = body[:300].decode(errors="replace")
    kinds = {400: BadInput, 404: NotFound, 503: Unavailable, 429: Unavailable}
    return kinds.get(fault.code, StageFailed)(f"the server answered {fault.code}: {words}")


def _spec(facts: dict[str, Any]) -> TensorSpec:
    shape: tuple[Axis, ...] = tuple(axis if axis >= 0 else Free(0) for axis in facts["shape"])
    return TensorSpec(facts["name"], facts["datatype"], shape)


def _answer(body: bytes, length: int | None) -> dict[str, Array]:
    from torchship.wire.json_arrays import decode_json_data

    answer = msgspec.json.decode(body if length is None else body[:length])
    rest = memoryview(b"" if length is None else body[length:])
    found: dict[str, Array] = {}
    for item in answer["outputs"]:
        size = (item.get("parameters") or {}).get("binary_data_size")
        facts = {key: item[key] for key in ("name", "datatype", "shape")}
        if size is None:
            found[item["name"]] = decode_json_data(msgspec.Raw(msgspec.json.encode(item["data"])), **facts)
        else:
            found[item["name"]] = decode_raw(rest[:size], **facts)
            rest = rest[size:]
    return found
