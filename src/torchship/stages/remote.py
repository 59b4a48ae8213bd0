"""A model on other servers as a stage: any Open Inference Protocol server over gRPC (torchship, Triton, KServe)."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from torchship.errors import (
    BadConfig,
    BadInput,
    Busy,
    Denied,
    Expired,
    NotFound,
    StageFailed,
    TorchshipError,
    Unavailable,
    Unsupported,
)
from torchship.stage import Parameter, Parameters, Value, join
from torchship.stages.endpoints import Endpoint, Endpoints
from torchship.tensors import Axis, Free, Signature, Tensors, TensorSpec

_SERVICE = "/inference.GRPCInferenceService"
_AGAIN = ("UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "ABORTED")
_SICK = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "INTERNAL", "UNKNOWN", "DATA_LOSS")


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
        try:
            import grpc
        except ImportError:
            raise Unavailable("remote stages need the package grpcio", hint="pip install grpcio") from None
        self._grpc = grpc
        self._options = options
        found = [Endpoint.parse(url) for url in urls]
        self._endpoints = Endpoints(
            found,
            clock=time.monotonic,
            failures=options.breaker_failures,
            pause=options.breaker_pause,
            ratio=options.retry_ratio,
        )
        self._channels = {id(one): self._channel(one) for one in found}
        self._headers = self._credentials()
        self.parameters: tuple[Parameter, ...] = ()
        try:
            self.signature = signature or self._metadata()
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
        from torchship.wire.asking import decode_grpc, encode_grpc
        from torchship.wire.messages import Request

        bodies: dict[tuple[str, str], bytes] = {}

        def body(one: Endpoint) -> bytes:
            key = one.model, one.version
            if key not in bodies:
                bodies[key] = encode_grpc(Request(one.model, tensors, one.version, parameters=given))
            return bodies[key]

        return decode_grpc(self._ask("ModelInfer", body)).outputs

    def close(self) -> None:
        """Close all connections."""
        self._pool.shutdown(wait=False)
        self._hang_up()

    def _hang_up(self) -> None:
        for channel in self._channels.values():
            channel.close()

    def _metadata(self) -> Signature:
        from torchship.wire.schema import message

        def body(one: Endpoint) -> bytes:
            asked = message("inference.ModelMetadataRequest")(name=one.model, version=one.version)
            return bytes(asked.SerializeToString())

        answer = message("inference.ModelMetadataResponse").FromString(self._ask("ModelMetadata", body))
        return _signature(answer)

    def _ask(self, method: str, body: Any) -> bytes:
        ends = time.monotonic() + self._options.patience
        fault: TorchshipError | None = None
        for one in self._endpoints.attempts(self._options.attempts):
            left = ends - time.monotonic()
            if left <= 0:
                break
            call = self._channels[id(one)].unary_unary(f"{_SERVICE}/{method}")
            try:
                answer: bytes = call(body(one), timeout=min(self._options.timeout, left), metadata=self._headers)
            except self._grpc.RpcError as refusal:
                fault, again = self._judge(one, refusal)
                if not again:
                    raise fault from None
                continue
            self._endpoints.succeeded(one)
            return answer
        if fault is not None:
            raise fault
        pause = self._endpoints.opens_in
        names = ", ".join(map(str, self._endpoints.all))
        raise Busy(f"no endpoint of {names} answers", hint="they failed again and again", retry_after=max(pause, 0.1))

    def _judge(self, one: Endpoint, refusal: Any) -> tuple[TorchshipError, bool]:
        """Our error for the server's, and whether another attempt may help."""
        code = refusal.code().name
        if code in _SICK:
            self._endpoints.failed(one)
        else:
            self._endpoints.succeeded(one)  # it is alive: it said no
        return _error(code, f"{one}: {refusal.details() or code}"), code in _AGAIN

    def _channel(self, one: Endpoint) -> Any:
        sizes = [(f"grpc.max_{way}_message_length", self._options.max_message) for way in ("send", "receive")]
        pace = [("grpc.enable_retries", 0), ("grpc.min_reconnect_backoff_ms", 100),
                ("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 2000)]  # fmt: skip
        if not one.secure:
            return self._grpc.insecure_channel(one.address, [*sizes, *pace])
        try:
            roots = Path(self._options.ca).read_bytes() if self._options.ca else None
        except OSError as fault:
            raise BadConfig(f"options.ca: {fault}") from None
        return self._grpc.secure_channel(one.address, self._grpc.ssl_channel_credentials(roots), [*sizes, *pace])

    def _credentials(self) -> tuple[tuple[str, str], ...]:
        if not self._options.token_env:
            return ()
        token = os.environ.get(self._options.token_env)
        if not token:
            raise BadConfig(f"the environment has no {self._options.token_env}", hint="set it to the server's token")
        return (("authorization", f"Bearer {token}"),)


def _splits(signature: Signature) -> bool:
    """Whether a batch may be cut: its answers can be joined again, for all of them have rows of one shape."""
    axes = [axis for spec in signature.outputs for axis in spec.shape[1:]]
    return signature.batched and all(isinstance(axis, int) for axis in axes)


def _error(code: str, message: str) -> TorchshipError:
    kinds: dict[str, type[TorchshipError]] = {
        "INVALID_ARGUMENT": BadInput,
        "NOT_FOUND": NotFound,
        "UNIMPLEMENTED": Unsupported,
        "PERMISSION_DENIED": Denied,
        "UNAUTHENTICATED": Denied,
        "DEADLINE_EXCEEDED": Expired,
        "UNAVAILABLE": Unavailable,
        "RESOURCE_EXHAUSTED": Busy,
    }
    return kinds.get(code, StageFailed)(message)


def _signature(answer: Any) -> Signature:
    """The signature in a model's metadata: batched where every tensor's first axis is free."""
    inputs, outputs = (tuple(map(_spec, side)) for side in (answer.inputs, answer.outputs))
    free = [bool(spec.shape) and isinstance(spec.shape[0], Free) for spec in (*inputs, *outputs)]
    return Signature(inputs, outputs, batched=bool(free) and all(free))


def _spec(item: Any) -> TensorSpec:
    shape: tuple[Axis, ...] = tuple(axis if axis >= 0 else Free() for axis in item.shape)
    return TensorSpec(item.name, item.datatype, shape)
