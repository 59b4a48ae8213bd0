"""A mount may bring work beside its routes: it runs while the server serves, and its faults are its own."""

from __future__ import annotations

import asyncio
import logging

import pytest

from torchship.serve import config as configs
from torchship.serve.host import Server
from torchship.serve.routes import Exchange, Mounted, Route, Service

STEPS: list[str] = []


async def _steady() -> None:
    STEPS.append("begun")
    try:
        await asyncio.Event().wait()
    finally:
        await asyncio.sleep(0)  # it may end in its own time: the server waits
        STEPS.append("ended")


async def _broken() -> None:
    raise RuntimeError("no camera")


def _hello(exchange: Exchange) -> None:
    exchange.answer_json("hello")


def steady(service: Service) -> Mounted:
    return Mounted([Route("GET", "/v1/hello", _hello)], _steady)


def broken(service: Service) -> Mounted:
    return Mounted(run=_broken)


def test_work_beside_the_requests_ends_before_the_server_and_its_faults_are_its_own(
    caplog: pytest.LogCaptureFixture,
) -> None:
    mounts = [{"run": f"{__name__}:{name}"} for name in ("steady", "broken")]
    config = configs.convert({"http": {"port": 0}, "mount": mounts})

    async def serve() -> None:
        server = await Server(config).open()
        await asyncio.sleep(0.05)
        assert STEPS == ["begun"]
        assert server.service.ready
        await server.close(patience=0.0)

    with caplog.at_level(logging.ERROR, "torchship.serve"):
        asyncio.run(serve())
    assert STEPS == ["begun", "ended"]
    assert "no camera" in caplog.text
