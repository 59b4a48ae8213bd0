"""Which of several servers to ask, and when to stop asking: a circuit breaker for each and a retry budget for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from threading import Lock

from torchship.client.address import Address, parse
from torchship.client.retry import Budget
from torchship.errors import BadConfig


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
    clock: Callable[[], float]
    failures: int = 5
    pause: float = 1.0
    budget: Budget = field(default_factory=Budget)
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
