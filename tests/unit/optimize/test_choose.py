"""The choice is a pure function: goals, constraints, ties, and nobody who was refused."""

from __future__ import annotations

import pytest

from torchship.artifact.manifest import BatchPoint, Timing, Verdict
from torchship.errors import BadConfig
from torchship.optimize.choose import Constraints, choose, cost
from torchship.optimize.trial import Status, Trial
from torchship.recipe import Recipe


def trial(
    backend: str, *, p50: float = 10.0, p99: float = 0.0, rate: float = 100.0, size: int = 1000, memory: int = 1000,
    error: float = 0.0, status: Status = "ok", passed: bool = True,
) -> Trial:  # fmt: skip
    timing = Timing(
        (BatchPoint(1, p50, p50, p99 or p50 * 2, 1000 / p50), BatchPoint(8, p50, p50, p50, rate)), 0.1, memory, size, 2
    )
    return Trial(Recipe(backend), status, verdict=Verdict(passed, error, 1.0), timing=timing)


EAGER = trial("eager", p50=10, rate=100, size=1000, memory=900)
FAST = trial("fast", p50=2, rate=300, size=2000, memory=2000, error=0.01)
SMALL = trial("small", p50=5, rate=900, size=250, memory=1500, error=0.1)
LEAN = trial("lean", p50=8, rate=80, size=900, memory=200)


@pytest.mark.parametrize(("goal", "winner"), [("latency", 1), ("throughput", 2), ("size", 2), ("memory", 3)])
def test_each_goal_has_its_winner(goal: str, winner: int) -> None:
    found = choose([EAGER, FAST, SMALL, LEAN], goal=goal)  # type: ignore[arg-type]
    assert found.winner == winner
    assert len(found.ranking) == 4
    assert found.ranking[0] == winner


def test_a_refused_failed_or_unmeasured_candidate_never_wins() -> None:
    refused = trial("refused", p50=0.1, status="refused", passed=False)
    liar = trial("liar", p50=0.1, status="ok", passed=False)
    failed = Trial(Recipe("failed"), "failed", failure="killed by SIGSEGV")
    silent = Trial(Recipe("silent"), "ok")
    found = choose([refused, liar, failed, silent, EAGER], goal="latency")
    assert found.winner == 4
    assert found.ranking == (4,)


def test_constraints_are_kept_and_named() -> None:
    found = choose([EAGER, FAST, SMALL], goal="latency", constraints=Constraints(max_size=1500))
    assert found.winner == 2
    assert "size" in found.outside[1]
    found = choose([EAGER, FAST], goal="latency", constraints=Constraints(max_latency_p99=1.0, max_memory=10))
    assert found.winner is None
    assert "p99 20 ms is above 1 ms" in found.outside[0]
    assert "memory" in found.reason
    found = choose([EAGER, FAST, SMALL], goal="latency", constraints=Constraints(max_size=200))
    assert found.reason == "3 valid candidates break a limit; the nearest is small: size 250 B is above 200 B"
    found = choose([EAGER, FAST], goal="latency", constraints=Constraints(max_size=1500))
    assert found.reason.endswith("; 1 that would be better breaks a limit")


def test_nobody_valid_says_why() -> None:
    found = choose([Trial(Recipe("eager"), "failed", failure="build: no")], goal="latency")
    assert found.winner is None
    assert "build: no" in found.reason


def test_of_two_that_are_equally_good_the_more_exact_wins() -> None:
    rough, exact = trial("rough", p50=2.0, error=0.2), trial("exact", p50=2.02, error=0.001)
    assert choose([rough, exact], goal="latency").winner == 1
    slower = trial("exact", p50=2.2, error=0.001)
    assert choose([rough, slower], goal="latency").winner == 0


def test_an_unknown_goal_is_named() -> None:
    with pytest.raises(BadConfig, match="speed"):
        cost(EAGER, goal="speed")  # type: ignore[arg-type]
