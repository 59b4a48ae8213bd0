"""HTTP for the cameras: list, add, change, pause, remove, while they run."""

from __future__ import annotations

from typing import Any

import msgspec

from torchship.errors import BadInput
from torchship.serve.routes import Exchange, Route, read_json
from torchship_video.config import CameraConfig, convert, redacted
from torchship_video.flow import Flow
from torchship_video.messages import CameraStatus


def camera_routes(flow: Flow) -> list[Route]:
    """The routes of a flow. What is changed here lasts until the server ends: cameras.toml is not written."""
    asked = _Cameras(flow)
    return [
        Route("GET", "/v1/cameras", asked.page, "infer", "How all cameras are doing."),
        Route("POST", "/v1/cameras", asked.add, "manage", "Watch one more camera."),
        Route("GET", "/v1/cameras/{camera}", asked.show, "infer", "How one camera is doing, and what is set."),
        Route("PATCH", "/v1/cameras/{camera}", asked.change, "manage", "Watch a camera another way."),
        Route("DELETE", "/v1/cameras/{camera}", asked.remove, "manage", "Watch a camera no more."),
        Route("POST", "/v1/cameras/{camera}/pause", asked.pause, "manage", "Stop decoding a camera."),
        Route("POST", "/v1/cameras/{camera}/resume", asked.resume, "manage", "Go on with a camera."),
    ]


class _Cameras:
    """The endpoints."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow

    async def page(self, exchange: Exchange) -> None:
        exchange.answer_json({"cameras": msgspec.to_builtins(self._flow.status())})

    async def show(self, exchange: Exchange) -> None:
        self._answer(exchange, exchange.head.places["camera"])

    async def add(self, exchange: Exchange) -> None:
        config: CameraConfig = convert_body(_body(exchange))
        self._flow.add(config)
        self._answer(exchange, config.name, status=201)

    async def change(self, exchange: Exchange) -> None:
        """The body holds what is to be changed; the rest stays."""
        name = exchange.head.places["camera"]
        known = msgspec.to_builtins(self._flow.camera(name).config)
        await self._flow.change(convert_body({**known, **_body(exchange), "name": name}))
        self._answer(exchange, name)

    async def remove(self, exchange: Exchange) -> None:
        name = exchange.head.places["camera"]
        await self._flow.remove(name)
        exchange.answer_json({"camera": name, "removed": True})

    async def pause(self, exchange: Exchange) -> None:
        self._flow.pause(exchange.head.places["camera"], paused=True)
        self._answer(exchange, exchange.head.places["camera"])

    async def resume(self, exchange: Exchange) -> None:
        self._flow.pause(exchange.head.places["camera"], paused=False)
        self._answer(exchange, exchange.head.places["camera"])

    def _answer(self, exchange: Exchange, name: str, *, status: int = 200) -> None:
        camera = self._flow.camera(name)
        told: list[CameraStatus] = [one for one in self._flow.status() if one.camera == name]
        config = msgspec.structs.replace(camera.config, source=redacted(camera.config.source), options={})
        exchange.answer_json({**msgspec.to_builtins(told[0]), "config": msgspec.to_builtins(config)}, status=status)


def convert_body(data: dict[str, Any]) -> CameraConfig:
    """A camera of a request. Raises BadInput whose message starts with the path of the fault."""
    from torchship.errors import BadConfig

    try:
        found: CameraConfig = convert(data, kind=CameraConfig)
    except BadConfig as fault:
        raise BadInput(str(fault), hint="as in [[camera]] of cameras.toml") from None
    return found


def _body(exchange: Exchange) -> dict[str, Any]:
    return read_json(exchange, dict[str, Any])
