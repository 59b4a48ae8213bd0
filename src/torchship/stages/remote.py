"""A model on other servers as a stage: any Open Inference Protocol server over gRPC (torchship, Triton, KServe).

Which of them is asked, and when one is left alone: a circuit breaker for each and a retry budget for all.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import pairwise
from threading import Lock
from typing import Any, TypeVar

import msgspec

from torchship.client.address import Address, caller_context, parse
from torchship.client.grpc import GrpcChannel, ask_metadata
from torchship.client.retry import Budget
from torchship.errors import BadConfig, Busy, Expired, StageFailed, TorchshipError, Unavailable
from torchship.stage import Parameter, Parameters, Value, join
from torchship.tensors import Free, Signature, Tensors
from torchship.wire.messages import Request
from torchship.wire.oip_grpc import decode_response, encode_request
from torchship.wire.oip_json import signature_of

T = TypeVar("T")


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`timeout` bounds one attempt and `patience` all attempts of one request, both in seconds.

    `retry_ratio` of all requests may be retries; `breaker_failures` in a row stop asking an endpoint for
    `breaker_pause` seconds. A batch is asked for in `parallel` parts at the same time, in one for each endpoint when 0.
    `token_env` names the environment variable with a bearer token, `ca` a file of
    certificates for grpcs. `parameters` are passed on with every request. `max_message` in bytes.
    """

    timeout: float = 10.0
    patience: float = 30.0
    attempts: int = 3
    retry_ratio: float = 0.2
    breaker_failures: int = 5
    breaker_pause: float = 1.0
    parallel: int = 0
    token_env: str = ""
    ca: str = ""
    parameters: dict[str, str | int | float | bool] = {}
    max_message: int = 2**28


_DEFAULTS = Options()


def read_options(options: Mapping[str, Any]) -> Options:
    """Options of a remote stage. Raises BadConfig naming the wrong one."""
    try:
        found = msgspec.convert(dict(options), Options)
    except msgspec.ValidationError as fault:
        raise BadConfig(f"options: {fault}", hint=f"there is {', '.join(Options.__struct_fields__)}") from None
    if found.attempts < 1 or found.timeout <= 0 or found.patience <= 0 or not 0 <= found.parallel <= 256:
        raise BadConfig("options: attempts, timeout and patience must be positive, parallel 0 to 256")
    return found


@dataclass
class Endpoint:
    """One server. After `failures` failures in a row it is not asked for a while; then one request may try it."""

    address: Address
    failures: int = 0
    opens_at: float = 0.0
    pause: float = 0.0

    @classmethod
    def parse(cls, url: str) -> Endpoint:
        """Read `grpc://host:port/model` or `grpcs://host:port/model/version`. Raises BadConfig."""
        hint = "as in grpc://127.0.0.1:8001/classify"
        try:
            found = parse(url)
        except BadConfig as fault:
            raise BadConfig(f"{url!r} is not an endpoint: {fault}", hint=hint) from None
        if not found.grpc or not found.model or f"{found.netloc}/" not in url:
            raise BadConfig(f"{url!r} is not an endpoint: scheme, port or model is missing", hint=hint)
        return cls(found)

    def __str__(self) -> str:
        return f"{self.address.netloc}/{self.address.model}"


@dataclass
class Endpoints:
    """Servers in turn. `failures` in a row open the circuit of one for `pause` seconds, twice as long each time up to
    half a minute. Retries are taken out of one budget.
    All methods may be called from any thread.
    """

    all: Sequence[Endpoint]
    failures: int = 5
    pause: float = 1.0
    budget: Budget = field(default_factory=Budget)
    clock: Callable[[], float] = time.monotonic
    turn: int = 0
    lock: Lock = field(default_factory=Lock)

    def attempts(self, most: int) -> Iterator[Endpoint]:
        """The endpoints to ask for one request, the first in turn and then, while the budget lasts, others.

        None comes when all circuits are open; a second look at one endpoint only when there is no other.
        """
        self.budget.request()
        with self.lock:
            self.turn += 1
            turn = self.turn
        order = [self.all[(turn + i) % len(self.all)] for i in range(len(self.all))]
        for attempt in range(most):
            now = self.clock()
            able = [one for one in order if one.opens_at <= now]
            if not able or (attempt and not self.budget.retry()):
                return
            chosen = able[0]
            order.append(order.pop(order.index(chosen)))
            yield chosen

    def succeeded(self, one: Endpoint) -> None:
        """It answered: its circuit is closed."""
        with self.lock:
            one.failures, one.pause, one.opens_at = 0, 0.0, 0.0

    def failed(self, one: Endpoint) -> None:
        """It did not answer. A trial after a pause that fails opens the circuit again at once."""
        with self.lock:
            one.failures += 1
            now = self.clock()
            if now < one.opens_at:  # it was asked before the circuit opened
                return
            if one.failures >= self.failures or one.pause:
                one.pause = min(max(one.pause * 2, self.pause), 30.0)
                one.opens_at = now + one.pause

    @property
    def opens_in(self) -> float:
        """Seconds until some endpoint may be asked again."""
        return max(min(one.opens_at for one in self.all) - self.clock(), 0.0)


class Remote:
    """Asks the endpoints in turn. A request that one did not take or answer in time is retried on another."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        signature: Signature | None = None,
        options: Options = _DEFAULTS,
        max_batch: int = 0,
    ) -> None:
        """Without `signature` the first endpoint that answers is asked for its metadata.

        Raises BadConfig, Unavailable, NotFound.
        """
        self._options = options
        found, budget = [Endpoint.parse(url) for url in urls], Budget(ratio=options.retry_ratio)
        self._endpoints = Endpoints(found, options.breaker_failures, options.breaker_pause, budget)
        self._channels = {id(one): self._channel(one.address) for one in found}
        self.parameters: tuple[Parameter, ...] = ()
        try:
            self.signature = signature or signature_of(
                self._ask(lambda channel, to, timeout: ask_metadata(channel, to.model, to.version, timeout=timeout))
            )
        except BaseException:
            self._hang_up()
            raise
        self.max_batch = max_batch or (64 if self.signature.batched else 1)
        free = any(isinstance(axis, Free) for spec in self.signature.outputs for axis in spec.shape[1:])
        splits = self.signature.batched and not free  # its answers can be joined again: all have rows of one shape
        self._parts = (options.parallel or len(found)) if splits else 1
        self._pool = ThreadPoolExecutor(self._parts, "remote")  # starts no thread before it is needed

    def __call__(self, tensors: Tensors, parameters: Parameters = {}) -> Tensors:
        """The answers of some endpoints. Raises what the server said, Expired when none answered in time, Unavailable
        when none could be asked.
        """
        given = {**self._options.parameters, **parameters}
        rows = len(next(iter(tensors.values()))) if self._parts > 1 else 1
        parts = min(self._parts, rows)
        if parts < 2:
            return self._infer(tensors, given)
        ends = [rows * part // parts for part in range(parts + 1)]
        asked = [
            self._pool.submit(self._infer, {name: array[start:end] for name, array in tensors.items()}, given)
            for start, end in pairwise(ends)
        ]
        wait(asked)
        return join([one.result() for one in asked])

    def _infer(self, tensors: Tensors, given: dict[str, Value]) -> Tensors:
        @functools.cache
        def body(model: str, version: str) -> bytes:
            return encode_request(Request(model, tensors, version, parameters=given))

        def infer(channel: GrpcChannel, to: Address, timeout: float) -> bytes:
            return channel.call("ModelInfer", body(to.model, to.version), timeout=timeout)

        return decode_response(self._ask(infer)).outputs

    def close(self) -> None:
        """Close all connections."""
        self._pool.shutdown(wait=False)
        self._hang_up()

    def _hang_up(self) -> None:
        for channel in self._channels.values():
            channel.close()

    def _ask(self, call: Callable[[GrpcChannel, Address, float], T]) -> T:
        """What `call` gives for some endpoint; it is given the channel, the model there, and how long it may take."""
        ends = time.monotonic() + self._options.patience
        fault: TorchshipError | None = None
        for one in self._endpoints.attempts(self._options.attempts):
            left = ends - time.monotonic()
            if left <= 0:
                break
            try:
                answer = call(self._channels[id(one)], one.address, min(self._options.timeout, left))
            except TorchshipError as refusal:
                refusal.args = (f"{one}: {refusal}",)
                fault = refusal
                if isinstance(fault, Unavailable | Expired | StageFailed):
                    self._endpoints.failed(one)
                else:
                    self._endpoints.succeeded(one)  # it is alive: it said no
                if not isinstance(fault, Unavailable | Expired | Busy):
                    raise
                continue
            self._endpoints.succeeded(one)
            return answer
        if fault is not None:
            raise fault
        pause = self._endpoints.opens_in
        names = ", ".join(map(str, self._endpoints.all))
        raise Busy(f"no endpoint of {names} answers", hint="they failed again and again", retry_after=max(pause, 0.1))

    def _channel(self, address: Address) -> GrpcChannel:
        """Raises BadConfig for a token or authorities that are not there."""
        options, headers = self._options, {}
        if options.token_env:
            token = os.environ.get(options.token_env)
            if not token:
                raise BadConfig(f"the environment has no {options.token_env}", hint="set it to the server's token")
            headers = {"authorization": f"Bearer {token}"}
        try:
            tls = caller_context(authority=options.ca) if address.secure else None
        except BadConfig as fault:
            raise BadConfig(f"options.ca: {fault}") from None
        return GrpcChannel(address, tls=tls, headers=headers, max_message=options.max_message)
