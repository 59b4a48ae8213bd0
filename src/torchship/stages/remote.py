"""A model on other servers as a stage: any Open Inference Protocol server over gRPC (torchship, Triton, KServe)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise
from typing import Any, TypeVar

import msgspec

from torchship.client.address import caller_context
from torchship.client.grpc import GrpcChannel, ask_metadata
from torchship.client.retry import Budget
from torchship.errors import BadConfig, Busy, Expired, StageFailed, TorchshipError, Unavailable
from torchship.stage import Parameter, Parameters, Value, join
from torchship.stages.endpoints import Endpoint, Endpoints
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
        found = [Endpoint.parse(url) for url in urls]
        self._endpoints = Endpoints(
            found,
            clock=time.monotonic,
            failures=options.breaker_failures,
            pause=options.breaker_pause,
            budget=Budget(ratio=options.retry_ratio),
        )
        headers = self._credentials()
        self._channels = {id(one): self._channel(one, headers) for one in found}
        self.parameters: tuple[Parameter, ...] = ()
        try:
            self.signature = signature or signature_of(self._ask(self._about))
        except BaseException:
            self._hang_up()
            raise
        self.max_batch = max_batch or (64 if self.signature.batched else 1)
        self._parts = (options.parallel or len(found)) if _splits(self.signature) else 1
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
        bodies: dict[tuple[str, str], bytes] = {}

        def infer(channel: GrpcChannel, one: Endpoint, timeout: float) -> bytes:
            model, version = one.address.model, one.address.version
            if (model, version) not in bodies:
                bodies[model, version] = encode_request(Request(model, tensors, version, parameters=given))
            return channel.call("ModelInfer", bodies[model, version], timeout=timeout)

        return decode_response(self._ask(infer)).outputs

    @staticmethod
    def _about(channel: GrpcChannel, one: Endpoint, timeout: float) -> dict[str, Any]:
        return ask_metadata(channel, one.address.model, one.address.version, timeout=timeout)

    def close(self) -> None:
        """Close all connections."""
        self._pool.shutdown(wait=False)
        self._hang_up()

    def _hang_up(self) -> None:
        for channel in self._channels.values():
            channel.close()

    def _ask(self, call: Callable[[GrpcChannel, Endpoint, float], T]) -> T:
        ends = time.monotonic() + self._options.patience
        fault: TorchshipError | None = None
        for one in self._endpoints.attempts(self._options.attempts):
            left = ends - time.monotonic()
            if left <= 0:
                break
            try:
                answer = call(self._channels[id(one)], one, min(self._options.timeout, left))
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

    def _channel(self, one: Endpoint, headers: Mapping[str, str]) -> GrpcChannel:
        try:
            tls = caller_context(authority=self._options.ca) if one.address.secure else None
        except BadConfig as fault:
            raise BadConfig(f"options.ca: {fault}") from None
        return GrpcChannel(one.address, tls=tls, headers=headers, max_message=self._options.max_message)

    def _credentials(self) -> dict[str, str]:
        if not self._options.token_env:
            return {}
        token = os.environ.get(self._options.token_env)
        if not token:
            raise BadConfig(f"the environment has no {self._options.token_env}", hint="set it to the server's token")
        return {"authorization": f"Bearer {token}"}


def _splits(signature: Signature) -> bool:
    """Whether a batch may be cut: its answers can be joined again, for all of them have rows of one shape."""
    return signature.batched and not any(
        isinstance(axis, Free) for spec in signature.outputs for axis in spec.shape[1:]
    )
