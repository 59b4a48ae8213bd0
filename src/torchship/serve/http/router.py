"""Paths to endpoints: a tree of path segments, matched once per distinct request head."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple
from unicodedata import category
from urllib.parse import unquote

from torchship.errors import BadConfig, BadInput
from torchship.serve.http.exchange import Endpoint, Exchange, Head, HttpFault, spawn

# A name from a URL ends up in look-ups, logs and metrics: nothing but this may pass.
NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.\-]{0,127}$"
ANY_TEXT = r"^.{1,200}$"
_NAME = re.compile(NAME)


class Route(NamedTuple):
    """`pattern` is a path with {places} for names, or {places:text} for printable text of at most 200 characters.

    `scope` is what a token must allow: "", infer, manage or metrics. `about` is a sentence for readers. The endpoint
    takes an Exchange and answers it; a coroutine function runs as a Task, and what it raises is sent.
    """

    method: str
    pattern: str
    endpoint: Endpoint
    scope: str = ""
    about: str = ""

    @property
    def path(self) -> str:
        """The pattern with nothing but names in its places, as OpenAPI writes it."""
        return self.pattern.replace(":text}", "}")


class Mounted(NamedTuple):
    """What a mount adds to a server: routes, and `run`, work beside the requests: a task while the server serves.

    `metrics` is called whenever somebody asks for the server's metrics, and gives `Metric`s of the mount's own.
    """

    routes: Sequence[Route] = ()
    run: Callable[[], Coroutine[Any, Any, None]] | None = None
    metrics: Callable[[], Iterable[Any]] | None = None


@dataclass(slots=True)
class _Node:
    children: dict[str, _Node] = field(default_factory=dict)
    place: str = ""
    below: _Node | None = None
    routes: dict[str, Route] = field(default_factory=dict)


class Router:
    """All routes of a server."""

    def __init__(self, routes: Iterable[Route]) -> None:
        """Raises BadConfig where two want the same path: one of them would never be asked."""
        self._root = _Node()
        for route in routes:
            node = self._root
            for part in route.pattern.strip("/").split("/"):
                if part.startswith("{"):
                    node.below = node.below or _Node(place=part[1:-1])
                    node = node.below
                else:
                    node = node.children.setdefault(part, _Node())
            if route.method in node.routes:
                raise BadConfig(f"{route.method} {route.path} is served already", hint="mount it at another path")
            coroutine = inspect.iscoroutinefunction(route.endpoint)
            endpoint = partial(_spawned, route.endpoint) if coroutine else route.endpoint
            node.routes[route.method] = route._replace(endpoint=endpoint)

    def resolve(self, head: Head) -> None:
        """Give `head` its endpoint, scope and places; a wrong path or verb becomes an endpoint that says so."""
        try:
            self._find(head)
        except (HttpFault, BadInput) as fault:
            error = fault
            head.endpoint = lambda exchange: exchange.fail(error)

    def _find(self, head: Head) -> None:
        node: _Node = self._root
        places = {}
        for raw in head.path.strip("/").split("/"):
            if raw in node.children:
                node = node.children[raw]
            elif node.below is not None:
                node = node.below
                places[node.place.removesuffix(":text")] = _checked(unquote(raw), node.place)
            else:
                raise HttpFault(404, "Not Found", hint="GET /docs lists what is served")
        if not node.routes:
            raise HttpFault(404, "Not Found", hint="GET /docs lists what is served")
        method = "GET" if head.method == "HEAD" and "HEAD" not in node.routes else head.method
        if method not in node.routes:
            allowed = ", ".join(sorted(node.routes))
            raise HttpFault(405, f"Method {head.method[:16]} Not Allowed", headers=(("allow", allowed),))
        route = node.routes[method]
        head.endpoint, head.scope, head.places = route.endpoint, route.scope, places


def _checked(name: str, place: str) -> str:
    if place.endswith(":text") and 0 < len(name) <= 200 and all(map(_is_text, name)):
        return name
    if not _NAME.fullmatch(name):
        raise BadInput(
            f"{place.removesuffix(':text')} in the path is not a name", hint="letters, digits, dot, dash and underscore"
        )
    return name


def _spawned(endpoint: Endpoint, exchange: Exchange) -> None:
    spawn(exchange, endpoint, exchange)


def _is_text(character: str) -> bool:
    """Printable, a space of any script, or one of the two joiners that are part of words."""
    return character.isprintable() or category(character) == "Zs" or character in "\u200c\u200d"
