"""The client without asyncio: the same calls, from any thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

from torchship.client.asynchronous import AsyncClient
from torchship.stage import Value
from torchship.tensors import Array, Tensors

T = TypeVar("T")


class Client:
    """Asks one server of the Open Inference Protocol; safe to share between threads.

    It takes what AsyncClient takes. The connections live in a thread of its own until `close`.
    """

    def __init__(self, url: str, **options: Any) -> None:
        """Raises BadConfig for a wrong URL."""
        self._loop = _new_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="torchship-client", daemon=True)
        self._thread.start()
        self._closed = False
        try:
            self._client = self._run(_make(url, options))
        except BaseException:
            self._stop()
            raise

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def infer(self, model: str, inputs: Tensors | Array, **options: Any) -> dict[str, Array]:
        """The outputs of one inference; see AsyncClient.infer."""
        return self._run(self._client.infer(model, inputs, **options))

    def infer_many(self, model: str, inputs: Sequence[Tensors | Array], **options: Any) -> list[dict[str, Array]]:
        """Several inferences at a time, so that the server can batch them; the answers in the order of the inputs."""

        async def everything() -> list[dict[str, Array]]:
            return list(await asyncio.gather(*(self._client.infer(model, one, **options) for one in inputs)))

        return self._run(everything())

    def stream(
        self, model: str, inputs: Tensors | Array, *, version: str = "", parameters: Mapping[str, Value] = {}
    ) -> Iterator[dict[str, Array]]:
        """Every answer of a model that streams; see AsyncClient.stream."""
        answers = self._client.stream(model, inputs, version=version, parameters=parameters)
        try:
            while True:
                try:
                    yield self._run(_next(answers))
                except StopAsyncIteration:
                    return
        finally:
            self._run(answers.aclose())  # type: ignore[attr-defined]

    def metadata(self, model: str = "", version: str = "") -> dict[str, Any]:
        """The server's metadata, or a model's."""
        return self._run(self._client.metadata(model, version))

    def ready(self, model: str = "", version: str = "") -> bool:
        """Whether the server, or a model, answers now."""
        return self._run(self._client.ready(model, version))

    def statistics(self, model: str = "", version: str = "") -> dict[str, Any]:
        """Statistics of a model, or of all."""
        return self._run(self._client.statistics(model, version))

    def load(self, model: str) -> None:
        """Open or reload a model."""
        self._run(self._client.load(model))

    def unload(self, model: str) -> None:
        """Drain and close a model."""
        self._run(self._client.unload(model))

    def close(self) -> None:
        """Hang up and end the thread. May be called twice."""
        if not self._closed:
            self._run(self._client.close())
            self._stop()

    def _stop(self) -> None:
        self._closed = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _new_loop() -> asyncio.AbstractEventLoop:
    import uvloop

    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


async def _make(url: str, options: Mapping[str, Any]) -> AsyncClient:
    return AsyncClient(url, **options)


async def _next(answers: Any) -> Any:
    return await anext(answers)
