"""Versions: opened beside the old one, switched in one turn, drained; a failure leaves the old one serving."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import uvloop

from tests.serving import HERE
from tests.unit.artifact.made import linear
from torchship.artifact import Store
from torchship.errors import NotFound, TorchshipError, Unavailable, Unsupported
from torchship.pipeline.config import StageConfig
from torchship.serve import catalog as catalogs
from torchship.serve.catalog import Catalog
from torchship.serve.config import ModelConfig, Versions
from torchship.serve.service import Service
from torchship.wire.messages import Request, Response

ROW = np.array([[1, 2, 3, 4]], np.float32)


def run(work: Callable[[Catalog], Awaitable[None]], store: Path) -> None:
    """Run a coroutine with a catalog, which leaves no process behind when it is closed."""
    before = psutil.Process().children()

    async def bounded() -> None:
        catalog = Catalog(store=Store(store))
        async with asyncio.timeout(100):
            try:
                await work(catalog)
            finally:
                await catalog.close()

    uvloop.run(bounded())
    assert set(psutil.Process().children()) <= set(before)


def model(run: str = "double", **options: Any) -> ModelConfig:
    return ModelConfig(name="m", run=f"{HERE}:{run}", **options)


def test_a_reload_under_load_loses_nothing(tmp_path: Path) -> None:
    async def work(catalog: Catalog) -> None:
        await catalog.load(model("moody"))
        service = Service(catalog)
        stop = False
        seen: Counter[tuple[str, float]] = Counter()

        async def caller() -> None:
            while not stop:
                response = await service.submit(Request("m", {"x": ROW * 0 + 1000}))
                seen[response.version, float(response.outputs["y"][0, 0])] += 1

        callers = [asyncio.ensure_future(caller()) for _ in range(8)]
        for _ in range(3):
            before = len(seen)
            await catalog.load(model("moody"))
            async with asyncio.timeout(20):
                while len(seen) == before:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        stop = True
        await asyncio.gather(*callers)
        assert {version for version, _ in seen} == {"1"}  # what is not in a store has one version, reloaded or not
        assert len(seen) == 4  # processes
        assert service.repository_index() == [{"name": "m", "version": "1", "state": "READY", "reason": ""}]
        assert list(catalog.lines()) == [("m", "1")]

    run(work, tmp_path)


def test_a_version_that_does_not_open_leaves_the_old_one_serving(tmp_path: Path) -> None:
    async def work(catalog: Catalog) -> None:
        service = Service(catalog)
        await catalog.load(model("Adder"))
        with pytest.raises(TorchshipError, match="start is negative"):
            await catalog.load(model("Adder", options={"start": -1.0}))
        answer = await service.submit(Request("m", {"x": np.ones(1, np.float32)}))
        assert answer.version == "1"
        (index,) = service.repository_index()
        assert (index["version"], index["state"]) == ("1", "READY")
        assert "reload failed: stage 'adder'" in index["reason"]
        assert "start is negative" in index["reason"]
        assert service.ready

    run(work, tmp_path)


def test_a_model_that_never_opened_says_why(tmp_path: Path) -> None:
    async def work(catalog: Catalog) -> None:
        service = Service(catalog, control=True)
        with pytest.raises(TorchshipError, match="start is negative"):
            await catalog.load(model("Adder", options={"start": -1.0}))
        assert not service.ready
        assert not service.model_ready("m")
        with pytest.raises(Unavailable, match="start is negative"):
            service.submit(Request("m", {"x": ROW}))
        with pytest.raises(NotFound, match="Request for unknown model: 'n' is not found"):
            service.submit(Request("n", {"x": ROW}))
        with pytest.raises(NotFound, match="version 7"):
            service.submit(Request("m", {"x": ROW}, version="7"))

    run(work, tmp_path)


def test_unload_and_load(tmp_path: Path) -> None:
    async def work(catalog: Catalog) -> None:
        service = Service(catalog, control=True)
        await catalog.load(model())
        await service.repository_unload("m", {})
        assert not service.model_ready("m")
        with pytest.raises(Unavailable, match="unloaded"):
            service.submit(Request("m", {"x": ROW}))
        await service.repository_load("m", {})
        assert service.ready
        assert (await service.submit(Request("m", {"x": ROW}))).version == "1"
        with pytest.raises(Unsupported, match="control is off"):
            await Service(catalog).repository_unload("m", {})

    run(work, tmp_path)


def test_shares_and_shadow(tmp_path: Path) -> None:
    async def work(catalog: Catalog) -> None:
        service = Service(catalog)
        await catalog.load(model())
        entry = catalog.entry("m")
        await catalog._switch(
            entry, model(versions=Versions(weights={"1": 1.0}, shadow="1")), {"1": entry.versions["1"]}
        )
        found = [await service.submit(Request("m", {"x": ROW})) for _ in range(4)]
        assert {response.version for response in found} == {"1"}
        line = entry.versions["1"].line
        assert line is not None
        async with asyncio.timeout(10):
            while line.meter.success < 8:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    run(work, tmp_path)


def test_the_store_is_watched_and_policies_choose(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def publish(number: int) -> None:
        linear(tmp_path / f"made{number}", name="linear")
        assert store.publish(tmp_path / f"made{number}", name="linear") == number

    async def work(catalog: Catalog) -> None:
        service = Service(catalog)

        def ready() -> set[str]:
            return {found["version"] for found in service.repository_index(ready=True)}

        await catalog.load(ModelConfig(name="m", artifact="linear@current"))
        assert ready() == {"1"}
        watching = asyncio.ensure_future(catalog.watch(0.05))
        await asyncio.to_thread(publish, 2)
        async with asyncio.timeout(20):
            while ready() != {"2"}:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        name = catalog.line("m")[0].plan.signature.inputs[0].name
        row = np.ones((1, 3), np.float32)
        assert (await service.submit(Request("m", {name: row}))).version == "2"
        watching.cancel()
        await catalog.load(ModelConfig(name="m", artifact="linear", versions=Versions(all=True)), fresh=False)
        assert ready() == {"1", "2"}
        assert (await service.submit(Request("m", {name: row}, version="1"))).version == "1"
        assert service.model_metadata("m")["versions"] == ["1", "2"]
        latest = Versions(latest=2, weights={"1": 1.0, "2": 3.0})
        await catalog.load(ModelConfig(name="m", artifact="linear", versions=latest), fresh=False)
        seen = Counter([(await service.submit(Request("m", {name: row}))).version for _ in range(60)])
        assert seen["2"] > seen["1"] > 0
        with pytest.raises(NotFound, match="no version"):
            await catalog.load(ModelConfig(name="m", artifact="linear", versions=Versions(listed=(1, 9))))
        assert ready() == {"1", "2"}

    publish(1)
    run(work, tmp_path)


def test_a_reload_lets_the_old_version_finish_however_long_that_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogs, "_WAIT", 0.05)

    async def work(catalog: Catalog) -> None:
        await catalog.load(model("endless"))
        service = Service(catalog)

        def ask(number: int) -> AsyncIterator[Response]:
            return service.stream(Request("m", {"n": np.array([number], np.int32)}))

        old = ask(0)
        assert int((await anext(old)).outputs["i"][0]) == 0
        await catalog.load(model("endless"))
        new = ask(1000)
        assert int((await anext(new)).outputs["i"][0]) == 1000
        await new.aclose()  # type: ignore[attr-defined]
        draining = asyncio.ensure_future(catalog.drain())  # waits for the version that is no longer listed, too
        for number in range(1, 40):
            assert int((await anext(old)).outputs["i"][0]) == number
        assert not draining.done()
        await old.aclose()  # type: ignore[attr-defined]
        await draining

    run(work, tmp_path)


def test_what_is_told_about_a_pipeline(tmp_path: Path) -> None:
    async def work(catalog: Catalog) -> None:
        stages = (StageConfig(run=f"{HERE}:double"), StageConfig(run=f"{HERE}:sums"))
        await catalog.load(ModelConfig(name="m", stages=stages, queue_rows=500))
        service = Service(catalog)
        before = time.time()
        for rows in (1, 5, 4):
            await service.submit(Request("m", {"x": np.ones((rows, 4), np.float32)}))
        (told,) = service.statistics("m")["model_stats"]
        assert (told["inference_count"], told["execution_count"]) == (10, 3)
        assert before * 1e3 - 1 <= told["last_inference"] <= time.time() * 1e3 + 1
        assert service.model_config("m")["max_batch_size"] == 500  # rows are cut for each stage: the queue bounds them

    run(work, tmp_path)
