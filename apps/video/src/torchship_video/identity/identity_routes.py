"""The identities over HTTP: list them, show their evidence, merge, split and forget by hand."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from torchship.errors import BadInput, NotFound
from torchship.serve.routes import Exchange, Route, query_words
from torchship_video.identity.identities import Identities
from torchship_video.identity.visits import Visit

_MOST = 1000


class MergeRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a merge: the identity that becomes part of the one in the path."""

    other: int


class SplitRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a split: the serials of the visits that are somebody else."""

    visits: list[int]


def routes(identities: Identities) -> list[Route]:
    """The routes, for a mount: reading takes the scope `infer`, changing `manage`."""
    asked = _Asked(identities)
    one = "/v1/identities/{identity}"
    return [
        Route("GET", "/v1/identities", asked.page, "infer", "Who was seen: ?limit=100&after=NUMBER&camera=NAME."),
        Route("GET", one, asked.show, "infer", "One identity: its visits, how well they fit, and its crops."),
        Route("GET", f"{one}/crops/{{visit}}/{{crop}}", asked.crop, "infer", "One crop as JPEG."),
        Route("POST", f"{one}/merge", asked.merge, "manage", 'It and another are one: {"other": NUMBER}.'),
        Route("POST", f"{one}/split", asked.split, "manage", 'Visits are somebody else: {"visits": [SERIAL]}.'),
        Route("DELETE", one, asked.forget, "manage", "Remove it, its embeddings and its crops."),
        Route("GET", "/v1/transitions", asked.transitions, "infer", "Travel times between cameras, as learned."),
    ]


class _Asked:
    """What the routes do. What waits for the disk runs in a thread."""

    def __init__(self, identities: Identities) -> None:
        self._identities = identities

    async def page(self, exchange: Exchange) -> None:
        query = query_words(exchange.head)
        limit, after = _number(query.get("limit", "100"), "limit"), _number(query.get("after", "0"), "after")
        if not 1 <= limit <= _MOST:
            raise BadInput(f"limit is {limit}, expected 1 to {_MOST}")
        camera = query.get("camera")
        found = []
        for number in (number for number in self._identities.numbers() if number > after):
            try:
                visits = self._identities.visits(number)
            except NotFound:
                continue
            if camera is None or any(visit.camera == camera for visit in visits):
                found.append(_summary(number, visits))
            if len(found) == limit:
                break
        following = found[-1]["identity"] if len(found) == limit else None
        exchange.answer_json({"identities": found, "next": following, "count": len(self._identities.numbers())})

    async def show(self, exchange: Exchange) -> None:
        number = _place(exchange, "identity")
        visits = self._identities.visits(number)
        exchange.answer_json({**_summary(number, visits), "visits": [_described(number, visit) for visit in visits]})

    async def crop(self, exchange: Exchange) -> None:
        number, serial, place = (_place(exchange, name) for name in ("identity", "visit", "crop"))
        crops = [visit.crops for visit in self._identities.visits(number) if visit.serial == serial]
        if not crops or place >= len(crops[0]):
            raise NotFound(
                f"identity {number} has no crop {place} of visit {serial}", hint="GET the identity lists them"
            )
        exchange.answer(crops[0][place].jpeg, content_type="image/jpeg", headers=(("cache-control", "no-store"),))

    async def merge(self, exchange: Exchange) -> None:
        number, body = _place(exchange, "identity"), _body(exchange, MergeRequest)
        await asyncio.to_thread(self._identities.merge, number, body.other)
        exchange.answer_json({"identity": number, "merged": body.other})

    async def split(self, exchange: Exchange) -> None:
        number, body = _place(exchange, "identity"), _body(exchange, SplitRequest)
        new = await asyncio.to_thread(self._identities.split, number, body.visits)
        exchange.answer_json({"identity": number, "new": new})

    async def forget(self, exchange: Exchange) -> None:
        number = _place(exchange, "identity")
        gone = await asyncio.to_thread(self._identities.forget, number)
        exchange.answer_json({"identity": number, "forgotten": gone})

    async def transitions(self, exchange: Exchange) -> None:
        exchange.answer_json({"transitions": self._identities.transitions()})


def _summary(number: int, visits: list[Visit]) -> dict[str, Any]:
    return {
        "identity": number,
        "cameras": sorted({visit.camera for visit in visits}),
        "visit_count": len(visits),
        "first": min(visit.first for visit in visits),
        "last": max(visit.last for visit in visits),
        "ambiguous": any(visit.ambiguous for visit in visits),
    }


def _described(number: int, visit: Visit) -> dict[str, Any]:
    crops = [
        {
            "url": f"/v1/identities/{number}/crops/{visit.serial}/{place}",
            "quality": round(crop.quality, 3),
            "time": crop.time,
        }
        for place, crop in enumerate(visit.crops)
    ]
    return {
        "visit": visit.serial,
        "camera": visit.camera,
        "track": visit.track,
        "first": visit.first,
        "last": visit.last,
        "similarity": round(visit.similarity, 4),
        "quality": round(visit.quality, 3),
        "ambiguous": visit.ambiguous,
        "by_hand": visit.by_hand,
        "rivals": [{"identity": rival, "score": score} for rival, score in visit.rivals],
        "crops": crops,
    }


def _place(exchange: Exchange, name: str) -> int:
    return _number(exchange.head.places[name], name)


def _number(text: str, name: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 15):
        raise BadInput(f"{name} is {text[:40]!r}, expected a number")
    return int(text)


def _body(exchange: Exchange, kind: type[Any]) -> Any:
    try:
        return msgspec.json.decode(bytes(exchange.body), type=kind)
    except msgspec.MsgspecError as fault:
        fields = ", ".join(kind.__struct_fields__)
        raise BadInput(f"the body is no {kind.__name__}: {fault}", hint=f"a JSON object with {fields}") from None
