"""The two clients: numpy in, numpy out, over HTTP or gRPC; one for asyncio, one for everybody else."""

from __future__ import annotations

import asyncio
import functools
import os
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

from torchship.client.address import caller_context, parse
from torchship.client.grpc import GrpcLink
from torchship.client.http import HttpLink
from torchship.client.retry import Budget
from torchship.errors import BadConfig, BadInput, Expired, TorchshipError, Unavailable
from torchship.stage import Value
from torchship.tensors import Array, Tensors, as_array
from torchship.wire.messages import Request, Response, WantedOutput

P = ParamSpec("P")
T = TypeVar("T")
_CONTROL = 600.0  # seconds that loading or unloading a model may take
_INHERITED: list[Any] = []  # what a forked child was left of its parent's clients: never closed, for it is the parent's


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
        """`timeout` in seconds counts for a call with all its retries, and for each answer of a stream.

        Raises BadConfig for a wrong URL or header, Unavailable where gRPC's package is missing.
        """
        address = parse(url)
        every = {**headers, **({"Authorization": f"Bearer {token}"} if token else {})}
        if any(not (name + value).isascii() or not (name + value).isprintable() for name, value in every.items()):
            raise BadConfig("a header or the token holds a character that cannot be sent", hint="is it one line?")
        link = GrpcLink if address.grpc else HttpLink
        context = (tls or caller_context()) if address.secure else None
        self._link: GrpcLink | HttpLink = link(address, tls=context, headers=every, size=connections)
        self._timeout = timeout
        self._budget = budget or Budget()
        self._process = os.getpid()

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
        request = await self._request(model, inputs, version, parameters)
        request.id, request.priority = request_id, priority
        request.outputs = tuple(WantedOutput(name, binary=True) for name in outputs)
        response = await self.submit(request, timeout=timeout)
        return dict(response.outputs)

    async def submit(self, request: Request, *, timeout: float = 0.0) -> Response:  # noqa: ASYNC109
        """The same with messages."""
        loop = asyncio.get_running_loop()
        whole = timeout or self._timeout
        end = loop.time() + whole
        self._budget.request()
        attempt = 0
        while True:
            attempt += 1
            request.deadline = end - loop.time()
            if request.deadline <= 0:
                raise Expired("no time left for another try")
            try:
                return await self._within(self._link.infer(request), request.deadline, whole)
            except TorchshipError as fault:
                pause = self._budget.pause(fault, attempt=attempt, left=end - loop.time())
                if pause is None:
                    raise
                await asyncio.sleep(pause)

    async def stream(
        self, model: str, inputs: Tensors | Array, *, version: str = "", parameters: Mapping[str, Value] = {}
    ) -> AsyncIterator[dict[str, Array]]:
        """Every answer of a model that streams; Expired where the next one does not come within the client's `timeout`.

        Over HTTP they come as JSON without shapes: Unsupported is raised for tensors with two lengths that are free.
        """
        answers = self._link.stream(await self._request(model, inputs, version, parameters))
        try:
            while (response := await self._within(anext(answers, None))) is not None:
                yield dict(response.outputs)
        finally:
            await answers.aclose()  # type: ignore[attr-defined]

    async def _request(
        self, model: str, inputs: Tensors | Array, version: str, parameters: Mapping[str, Value]
    ) -> Request:
        if not isinstance(inputs, Mapping):
            names = [item["name"] for item in (await self.metadata(model, version))["inputs"]]
            if len(names) != 1:
                hint = f"give a mapping of {', '.join(names)}"
                raise BadInput(f"model {model!r} has {len(names)} inputs", hint=hint)
            inputs = {names[0]: inputs}
        arrays = {name: as_array(array) for name, array in inputs.items()}
        return Request(model, arrays, version, parameters=dict(parameters))

    async def _within(self, work: Awaitable[T], seconds: float = 0.0, whole: float = 0.0) -> T:
        """What `work` gives, or Expired after `seconds`, told as a failure to answer within `whole`."""
        if self._process != os.getpid():
            getattr(work, "close", int)()
            raise Unavailable("this client was made before its process was forked", hint="make one in the child")
        try:
            return await asyncio.wait_for(work, seconds or self._timeout)
        except TimeoutError:
            raise Expired(f"no answer within {whole or seconds or self._timeout:g} s") from None

    async def metadata(self, model: str = "", version: str = "") -> dict[str, Any]:
        """The server's metadata, or a model's."""
        return await self._within(self._link.metadata(model, version))

    async def ready(self, model: str = "", version: str = "") -> bool:
        """Whether the server, or a model, answers now; a server that is not there is not ready."""
        try:
            return await self._within(self._link.ready(model, version))
        except TorchshipError:
            return False

    async def statistics(self, model: str = "", version: str = "") -> dict[str, Any]:
        """Statistics of a model, or of all."""
        return await self._within(self._link.statistics(model, version))

    async def load(self, model: str, *, timeout: float = _CONTROL) -> None:  # noqa: ASYNC109
        """Open or reload a model. Raises Unsupported where the server's model control is off."""
        await self._within(self._link.control("load", model), timeout)

    async def unload(self, model: str, *, timeout: float = _CONTROL) -> None:  # noqa: ASYNC109
        """Drain and close a model. Raises Unsupported where the server's model control is off."""
        await self._within(self._link.control("unload", model), timeout)

    async def close(self) -> None:
        """Hang up."""
        await self._link.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def _waiting(
    call: Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Client, P], T]:
    """The same call of a Client."""

    @functools.wraps(call)
    def wait(self: Client, /, *arguments: P.args, **options: P.kwargs) -> T:
        return self._wait(call(self._here, *arguments, **options))

    return wait


class Client:
    """Asks one server of the Open Inference Protocol; safe to share between threads, and usable after a fork.

    It takes what AsyncClient takes. The connections live in a thread of its own until `close`; a forked child makes
    its own at its first call.
    """

    def __init__(self, url: str, **options: Any) -> None:
        """Raises BadConfig for a wrong URL."""
        self._url, self._options = url, options
        self._closed = False
        self._lock = threading.Lock()
        self._start()

    def _start(self) -> None:
        import uvloop

        self._client = AsyncClient(self._url, **self._options)
        self._process = os.getpid()
        self._loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="torchship-client", daemon=True)
        self._thread.start()

    @property
    def _here(self) -> AsyncClient:
        """The client of this process."""
        if self._closed:
            raise Unavailable("this client is closed")
        with self._lock:
            if self._process != os.getpid():
                _INHERITED.append((self._client, self._loop))
                self._start()
        return self._client

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    infer = _waiting(AsyncClient.infer)
    metadata = _waiting(AsyncClient.metadata)
    ready = _waiting(AsyncClient.ready)
    statistics = _waiting(AsyncClient.statistics)
    load = _waiting(AsyncClient.load)
    unload = _waiting(AsyncClient.unload)

    def infer_many(self, model: str, inputs: Sequence[Tensors | Array], **options: Any) -> list[dict[str, Array]]:
        """Several inferences at a time, so that the server can batch them; the answers in the order of the inputs."""
        client = self._here

        async def everything() -> list[dict[str, Array]]:
            return list(await asyncio.gather(*(client.infer(model, one, **options) for one in inputs)))

        return self._wait(everything())

    def stream(self, model: str, inputs: Tensors | Array, **options: Any) -> Iterator[dict[str, Array]]:
        """Every answer of a model that streams; see AsyncClient.stream."""
        answers: Any = self._here.stream(model, inputs, **options)

        async def following() -> dict[str, Array] | None:
            return await anext(answers, None)

        try:
            while (answer := self._wait(following())) is not None:
                yield answer
        finally:
            if not self._closed and self._process == os.getpid():
                self._wait(answers.aclose())

    def close(self) -> None:
        """Hang up and end the thread. May be called twice."""
        if self._closed or self._process != os.getpid():
            return
        self._wait(self._client.close())
        self._closed = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
