"""The client for asyncio: numpy in, numpy out, over HTTP or gRPC."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
from google.protobuf.json_format import MessageToDict

from torchship.client.address import parse
from torchship.client.grpc import GrpcLink
from torchship.client.http import HttpLink
from torchship.client.retry import Budget
from torchship.errors import BadInput, Expired, TorchshipError
from torchship.stage import Value
from torchship.tensors import Array, Tensors
from torchship.wire.messages import Request, Response, WantedOutput


class AsyncClient:
    """Asks one server of the Open Inference Protocol (torchship, Triton, KServe ...).

    `url` is http://host:8000, https, grpc://host:8001 or grpcs. Use it in the loop in which it was made.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str = "",
        timeout: float = 60.0,
        budget: Budget | None = None,
        connections: int = 64,
        tls: ssl.SSLContext | None = None,
        headers: Mapping[str, str] = {},
    ) -> None:
        """`timeout` in seconds counts for a call with all its retries. Raises BadConfig for a wrong URL."""
        self._address = parse(url)
        context = (tls or ssl.create_default_context()) if self._address.secure else None
        every = {**headers, **({"Authorization": f"Bearer {token}"} if token else {})}
        kind = GrpcLink if self._address.grpc else HttpLink
        self._link: GrpcLink | HttpLink = kind(self._address, tls=context, headers=every, size=connections)
        self._timeout = timeout
        self._budget = budget or Budget()

    async def infer(
        self,
        model: str,
        inputs: Tensors | Array,
        *,
        version: str = "",
        outputs: Sequence[str] = (),
        parameters: Mapping[str, Value] = {},
        request_id: str = "",
        priority: int = 0,
        timeout: float = 0.0,  # noqa: ASYNC109  (it spans all tries)
    ) -> dict[str, Array]:
        """The outputs of one inference. `inputs` by name, or the array of the model's only input.

        Raises BadInput, NotFound, Busy, Expired, Unavailable, StageFailed ... as the server means it.
        """
        named = inputs if isinstance(inputs, Mapping) else await self._named(model, version, inputs)
        wishes = tuple(WantedOutput(name, binary=True) for name in outputs)
        arrays = {name: np.asarray(array) for name, array in named.items()}
        request = Request(model, arrays, version, request_id, dict(parameters), wishes, priority=priority)
        response = await self.submit(request, timeout=timeout)
        return dict(response.outputs)

    async def submit(self, request: Request, *, timeout: float = 0.0) -> Response:  # noqa: ASYNC109
        """The same with messages."""
        loop = asyncio.get_running_loop()
        end = loop.time() + (timeout or self._timeout)
        attempt = 0
        while True:
            attempt += 1
            request.deadline = end - loop.time()
            if request.deadline <= 0:
                raise Expired("no time left for another try")
            try:
                response = await asyncio.wait_for(self._link.infer(request), request.deadline)
            except TimeoutError:
                raise Expired(f"no answer within {timeout or self._timeout:g} s") from None
            except TorchshipError as fault:
                pause = self._budget.pause(fault, attempt=attempt, left=end - loop.time())
                if pause is None:
                    raise
                await asyncio.sleep(pause)
            else:
                self._budget.good()
                return response

    async def stream(
        self, model: str, inputs: Tensors | Array, *, version: str = "", parameters: Mapping[str, Value] = {}
    ) -> AsyncIterator[dict[str, Array]]:
        """Every answer of a model that streams.

        Over HTTP they come as JSON without shapes: Unsupported is raised for tensors with two lengths that are free.
        """
        named = inputs if isinstance(inputs, Mapping) else await self._named(model, version, inputs)
        request = Request(model, {name: np.asarray(array) for name, array in named.items()}, version)
        request.parameters = dict(parameters)
        link = self._link
        if isinstance(link, HttpLink):
            answers = link.stream(request, await self.metadata(model, version))
        else:
            answers = link.stream(request)
        async for response in answers:
            yield dict(response.outputs)

    async def _named(self, model: str, version: str, array: Array) -> Tensors:
        inputs = (await self.metadata(model, version))["inputs"]
        if len(inputs) != 1:
            names = ", ".join(item["name"] for item in inputs)
            raise BadInput(f"model {model!r} has {len(inputs)} inputs", hint=f"give a mapping of {names}")
        return {inputs[0]["name"]: array}

    async def metadata(self, model: str = "", version: str = "") -> dict[str, Any]:
        """The server's metadata, or a model's."""
        if isinstance(self._link, HttpLink):
            found: dict[str, Any] = await self._link.plain("GET", _path(model, version))
            return found
        if not model:
            return _plain(await self._link.plain("ServerMetadata"))
        return _plain(await self._link.plain("ModelMetadata", {"name": model, "version": version}))

    async def ready(self, model: str = "", version: str = "") -> bool:
        """Whether the server, or a model, answers now; a server that is not there is not ready."""
        try:
            if isinstance(self._link, HttpLink):
                await self._link.plain("GET", f"{_path(model, version)}/ready" if model else "/v2/health/ready")
                return True
            if not model:
                return bool((await self._link.plain("ServerReady")).ready)
            return bool((await self._link.plain("ModelReady", {"name": model, "version": version})).ready)
        except TorchshipError:
            return False

    async def statistics(self, model: str = "", version: str = "") -> dict[str, Any]:
        """Statistics of a model, or of all."""
        if isinstance(self._link, HttpLink):
            path = f"{_path(model, version)}/stats" if model else "/v2/models/stats"
            found: dict[str, Any] = await self._link.plain("GET", path)
            return found
        return _plain(await self._link.plain("ModelStatistics", {"name": model, "version": version}))

    async def load(self, model: str) -> None:
        """Open or reload a model. Raises Unsupported where the server's model control is off."""
        if isinstance(self._link, HttpLink):
            await self._link.plain("POST", f"/v2/repository/models/{model}/load", {})
        else:
            await self._link.plain("RepositoryModelLoad", {"model_name": model})

    async def unload(self, model: str) -> None:
        """Drain and close a model. Raises Unsupported where the server's model control is off."""
        if isinstance(self._link, HttpLink):
            await self._link.plain("POST", f"/v2/repository/models/{model}/unload", {})
        else:
            await self._link.plain("RepositoryModelUnload", {"model_name": model})

    async def close(self) -> None:
        """Hang up."""
        await self._link.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _path(model: str, version: str) -> str:
    if not model:
        return "/v2"
    return f"/v2/models/{model}" + (f"/versions/{version}" if version else "")


def _plain(answer: Any) -> dict[str, Any]:
    found: dict[str, Any] = MessageToDict(answer, preserving_proto_field_name=True)
    for side in ("inputs", "outputs"):
        for item in found.get(side, ()):
            item["shape"] = [int(axis) for axis in item.get("shape", ())]
    return found
