"""The public door for applications that answer HTTP beside the models, on the same port.

The server's file names a function, `[[mount]] run = "module:function"`. It is called once, with the Service and the
`options` of that table, before the port opens, and returns a list of `Route`, or `Mounted(routes, run, metrics)` where
there is work beside the requests: the coroutine function `run` is a task from when the models are open until the server
stops, when it is cancelled and awaited; `metrics` gives a list of `Metric` for `/metrics`. What the function raises
stops the start; what `run` raises is logged.

- `Route(method, pattern, endpoint, scope, about)`: `pattern` is a path with `{places}` for names and `{places:text}`
  for any printable text; `scope` is what a token must allow: "" (nothing), infer, manage or metrics.
- An endpoint is called with an `Exchange`. It calls `exchange.answer_json(value)` or `exchange.answer(bytes)` once, or
  `begin`, `write` and `end`; a coroutine function runs as a task, and what it raises is answered by its status.
- `exchange.head.places` holds the places of the path, `exchange.body` the body, decompressed and bounded.
- `service.infer(model, inputs)` asks a served model, `service.model_metadata(model)` tells what it takes.

    def mount(service: Service, *, greeting: str = "hello") -> list[Route]:
        async def greet(exchange: Exchange) -> None:
            found = await service.infer("classify", {"image": picture(exchange)})
            exchange.answer_json({greeting: found["label"][0].decode()})

        return [Route("POST", "/v1/greet", greet, "infer", "Greets what is in a picture.")]
"""

from torchship.serve.http.content import content_type, query_parameters, query_words, read_form, read_json
from torchship.serve.http.exchange import Exchange, HttpFault
from torchship.serve.http.router import Mounted, Route
from torchship.serve.prometheus import Metric
from torchship.serve.service import Service

__all__ = [
    "Exchange",
    "HttpFault",
    "Metric",
    "Mounted",
    "Route",
    "Service",
    "content_type",
    "query_parameters",
    "query_words",
    "read_form",
    "read_json",
]
