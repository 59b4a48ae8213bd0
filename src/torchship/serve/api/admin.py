"""Triton's extensions to look after a server, once for REST and gRPC: model repository, shared memory, settings."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from typing import Any

from torchship.errors import BadInput, Denied, NotFound, Unsupported
from torchship.serve.api.front import Front
from torchship.serve.api.regions import SharedMemory


class Admin:
    """What a token with the scope manage may do. Takes and gives plain data; raises what callers are told."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self._memory = front.regions or SharedMemory()  # an empty one: nothing can be registered

    def index(self, *, ready: object = False) -> list[dict[str, Any]]:
        """Every known model version. Raises BadInput where `ready` is no boolean."""
        if type(ready) is not bool:
            raise BadInput(f"ready is {ready!r:.60}, expected true or false")
        return self._front.service.repository_index(ready=ready)

    def load(self, model: str, parameters: object) -> Awaitable[None]:
        """Open or reload a model. Raises BadInput where the parameters are no object."""
        return self._front.service.repository_load(model, _mapping(parameters))

    def unload(self, model: str, parameters: object) -> Awaitable[None]:
        """Drain and close a model. Raises BadInput where the parameters are no object."""
        return self._front.service.repository_unload(model, _mapping(parameters))

    def regions(self, name: str = "") -> list[dict[str, Any]]:
        """The registered system shared memory, or one region of it. Raises NotFound."""
        return self._memory.status(name)

    def register(self, name: str, *, key: str, offset: int, size: int) -> None:
        """Register system shared memory. Raises Unsupported where it is off, BadInput for what cannot be had."""
        if self._front.regions is None:
            raise Unsupported("shared memory is off", hint="set shared_memory = true in [control]")
        self._memory.register(name, key=key, offset=offset, size=size)

    async def unregister(self, name: str = "") -> None:
        """Forget one region, or all of them, once no request uses it."""
        await self._memory.unregister(name)

    @staticmethod
    def cuda_regions(name: str = "") -> list[dict[str, Any]]:
        """There is no CUDA shared memory. Raises NotFound for a region of it."""
        if name:
            raise NotFound(f"Unable to find cuda shared memory region: '{name}'")
        return []

    @staticmethod
    def register_cuda(name: str) -> None:
        """Raises Unsupported."""
        text = f"failed to register CUDA shared memory region '{name}': this server does not take CUDA memory"
        raise Unsupported(text, hint="use system shared memory or binary tensors")

    def logging(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Change log settings; all of them as they are then."""
        return self._front.logs.change(changes)

    def trace(self, changes: Mapping[str, Any], model: str = "") -> dict[str, Any]:
        """Change trace settings, of one model or of all; as they are then. Raises NotFound for an unknown model."""
        if model:
            self._front.service.model_metadata(model)
        return self._front.tracing.change(changes, model)

    async def drain(self) -> None:
        """Answer what was begun and take nothing more; done when that is so, even if the caller has left.

        Raises Denied where no token is asked for: then every page in a browser of this machine could do it.
        """
        if self._front.drain is None or not self._front.guarded:
            raise Denied("only a token with the scope manage may do this", hint="add a [[token]] to the configuration")
        await asyncio.shield(asyncio.ensure_future(self._front.drain()))


def _mapping(parameters: object) -> Mapping[str, Any]:
    if not isinstance(parameters, Mapping):
        raise BadInput("parameters is not an object")
    return parameters
