"""Measures a served model: runs over concurrencies or rates, a search for the load that a latency target allows."""

from __future__ import annotations

import math
import ssl
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from torchship.client.address import Address
from torchship.client.asynchronous import AsyncClient
from torchship.client.load import Connect, Outcome, Shot, closed_loop, http_lanes, http_request, open_loop
from torchship.client.load_grpc import grpc_lanes
from torchship.client.tls import caller_context
from torchship.errors import BadInput
from torchship.tensors import Array, Tensors, bytes_array, dtype_name, numpy_dtype
from torchship.wire.asking import encode_grpc, encode_http
from torchship.wire.json_arrays import encode_json_data
from torchship.wire.messages import Request

ENCODINGS = ("binary", "json", "grpc")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: the load that was put on, and what came of it."""

    load: str
    kind: str
    outcome: Outcome

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return {"load": self.load, "kind": self.kind, **self.outcome.summary()}


@dataclass(frozen=True, slots=True)
class Target:
    """A model on a server, and how it is asked."""

    address: Address
    model: str
    encoding: str = "binary"
    token: str = ""
    tls: ssl.SSLContext | None = None

    @property
    def url(self) -> str:
        """Where the client finds it."""
        return f"{self.address.scheme}://{self.address.host}:{self.address.port}"

    def connect(self) -> Connect:
        """Opens lanes to it."""
        host, port = self.address.host, self.address.port
        tls = (self.tls or caller_context()) if self.address.secure else None
        if self.encoding == "grpc":
            if tls is not None:
                tls.set_alpn_protocols(["h2"])
            return grpc_lanes(host, port=port, token=self.token, tls=tls)
        if tls is not None:
            tls.set_alpn_protocols(["http/1.1"])
        return http_lanes(host, port=port, tls=tls)

    def shot(self, tensors: Tensors) -> Shot:
        """The bytes of one request."""
        request = Request(self.model, tensors)
        if self.encoding == "grpc":
            return Shot([encode_grpc(request)])
        headers = [("Authorization", f"Bearer {self.token}")] if self.token else []
        if self.encoding == "json":
            inputs = [
                {
                    "name": name,
                    "shape": list(array.shape),
                    "datatype": dtype_name(array.dtype),
                    "data": encode_json_data(array),
                }
                for name, array in tensors.items()
            ]
            body = msgspec.json.encode({"inputs": inputs})
            headers.append(("Content-Type", "application/json"))
        else:
            encoded = encode_http(request)
            body = encoded.data
            headers.append(("Inference-Header-Content-Length", str(encoded.header_length)))
            headers.append(("Content-Type", "application/octet-stream"))
        path = f"/v2/models/{self.model}/infer"
        return Shot([http_request(path, body, host=self.address.host, headers=headers)])


async def example(target: Target, *, rows: int = 1, file: bytes | None = None, free: int = 1) -> dict[str, Array]:
    """Random inputs of the model's shapes; `file` fills its BYTES input. One answer is awaited, to see that they fit.

    `rows` is the length of axis 0 where that is free, `free` that of the other free axes.
    Raises BadInput where a BYTES input has no file, and whatever the server says.
    """
    async with AsyncClient(target.url, token=target.token, tls=target.tls) as client:
        metadata = await client.metadata(target.model)
        random = np.random.default_rng(0)
        tensors = {}
        for item in metadata["inputs"]:
            shape = [axis if axis >= 0 else (rows if place == 0 else free) for place, axis in enumerate(item["shape"])]
            tensors[item["name"]] = _fill(item["name"], item["datatype"], shape, random, file)
        await client.infer(target.model, tensors)
        return tensors


def _fill(name: str, datatype: str, shape: list[int], random: np.random.Generator, file: bytes | None) -> Array:
    if datatype == "BYTES":
        if file is None:
            raise BadInput(f"input {name!r} takes BYTES", hint="give a file: --input cat.jpg")
        return bytes_array([file] * math.prod(shape)).reshape(shape)
    if datatype == "BOOL":
        return random.integers(0, 2, shape).astype(np.bool_)
    if datatype.startswith(("FP", "BF")):
        return random.random(shape).astype(numpy_dtype(datatype))
    return random.integers(0, 100, shape).astype(numpy_dtype(datatype))


async def by_concurrency(
    target: Target, shot: Shot, *, callers: Sequence[int], seconds: float, warm_up: float
) -> AsyncIterator[Row]:
    """One closed-loop run for each number of callers."""
    for count in callers:
        outcome = await closed_loop(shot, connect=target.connect(), concurrency=count, seconds=seconds, warm_up=warm_up)
        yield Row(f"{count} callers", "closed", outcome)


async def by_rate(
    target: Target, shot: Shot, *, rates: Sequence[float], seconds: float, lanes: int
) -> AsyncIterator[Row]:
    """One open-loop run for each rate of Poisson arrivals."""
    for rate in rates:
        yield Row(
            f"{rate:g}/s",
            "open",
            await open_loop(shot, connect=target.connect(), rate=rate, seconds=seconds, lanes=lanes),
        )


def meets(row: Row, *, percent: float, limit: float) -> bool:
    """Whether a run had no fault and its percentile is within `limit` seconds."""
    outcome = row.outcome
    return bool(outcome.latencies) and not outcome.faults and not outcome.late and outcome.percentile(percent) <= limit


async def sweep(
    target: Target, shot: Shot, *, percent: float, limit: float, seconds: float, warm_up: float = 0.5, most: int = 512
) -> AsyncIterator[Row]:
    """Doubles the callers until the latency target breaks or nothing is gained, then searches the highest open rate.

    The rate is halved in on seven times: the last good row is within one percent of what the target allows.
    """
    best, callers = 0.0, 1
    while callers <= most:
        outcome = await closed_loop(
            shot, connect=target.connect(), concurrency=callers, seconds=seconds, warm_up=warm_up
        )
        row = Row(f"{callers} callers", "closed", outcome)
        yield row
        gained = outcome.rate > best * 1.05
        best = max(best, outcome.rate)
        if not meets(row, percent=percent, limit=limit) or not gained:
            break
        callers *= 2
    low, high = 0.0, best
    for _ in range(7):
        rate = (low + high) / 2 if low else high / 2
        row = Row(
            f"{rate:.0f}/s",
            "open",
            await open_loop(shot, connect=target.connect(), rate=max(rate, 1.0), seconds=seconds),
        )
        yield row
        if meets(row, percent=percent, limit=limit):
            low = rate
        else:
            high = rate
        if high - low < 0.02 * high or high < 2:
            break
