"""A server that is told to stop: not ready but taking requests, then refusing, with what was begun answered."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from torchship.serve import config as configs
from torchship.serve.access import new_token
from torchship.serve.host import Server


@pytest.mark.parametrize("receivers", [0, 2])
def test_draining_in_two_steps(receivers: int) -> None:
    token, stored = new_token()
    config = configs.convert({
        "http": {"port": 0, "drain_delay": 1.0, "receivers": receivers},
        "token": [{"name": "hook", "hash": stored, "scopes": ["infer", "manage"]}],
        "model": [{"name": "sleeper", "run": "tests.serving:sleeper"}],
    })  # fmt: skip

    async def main() -> None:
        server = await Server(config).open()
        headers = {"authorization": f"Bearer {token}"}
        url = "/v2/models/sleeper/infer"

        def ask(ms: int) -> dict[str, object]:
            return {"inputs": [{"name": "ms", "shape": [1], "datatype": "INT32", "data": [ms]}]}

        async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
            assert (await client.post("/v2/drain")).status_code == 401
            assert (await client.get("/v2/health/ready")).status_code == 200
            drained = asyncio.ensure_future(client.post("/v2/drain", headers=headers))
            while (await client.get("/v2/health/ready")).status_code == 200:
                pass
            early = await client.post(url, json=ask(0), headers=headers)
            assert early.status_code == 200
            assert early.headers["connection"] == "close"  # the next one may reach another server
            long = asyncio.ensure_future(client.post(url, json=ask(1500), headers=headers))
            assert (await drained).status_code == 200
            assert long.done() or (await asyncio.wait([long], timeout=1))[0]
            assert (await long).status_code == 200
            assert (await client.post(url, json=ask(0), headers=headers)).status_code == 503
            assert (await client.get("/v2/health/live")).status_code == 200
        await server.close(patience=1.0)

    asyncio.run(main())
