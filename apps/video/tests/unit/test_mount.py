"""The parts of one `torchship watch` are wired to one another."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from torchship_video import config as configs
from torchship_video import mount
from torchship_video.appearance import HISTOGRAM_WIDTH


class Exchange:
    """As much of an exchange as the page's state needs."""

    told: dict[str, Any] = {}

    def answer(self, data: bytes, *, headers: object) -> None:
        self.told = json.loads(data)


def test_the_page_shows_the_identities_of_the_flow() -> None:
    async def told() -> list[dict[str, Any]]:
        watch = configs.convert({"view": True, "camera": [{"name": "door", "source": "door.mp4"}]})
        service: Any = None  # nothing is asked of it here
        application = mount._Application(service, watch, file="", until_end=False, terminal=False)
        vector = [1.0, *[0.0] * (HISTOGRAM_WIDTH - 1)]
        for moment in (1.0, 2.0, 3.0, 4.0):
            application.identities.update("door", 1, vector, 0.9, moment, crop=b"jpeg")
        application.identities.decide()
        (state,) = [route for route in application.mounted().routes if route.pattern == "/watch/state"]
        exchange: Any = Exchange()
        answered: Any = state.endpoint(exchange)
        if answered is not None:
            await answered
        found: list[dict[str, Any]] = exchange.told["identities"]
        return found

    (card,) = asyncio.run(told())
    assert card["cameras"] == ["door"]
    assert card["crops"]
