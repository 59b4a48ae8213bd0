"""What is published while a search runs: only what is better than what is current, and one version at a time."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tests.unit.artifact.made import linear
from tests.unit.optimize.test_choose import trial
from tests.unit.optimize.test_order import made_facts
from torchship.artifact import Store, open_artifact
from torchship.optimize.facts import Facts
from torchship.optimize.publishing import Publisher
from torchship.optimize.trial import Trial
from torchship.recipe import Options


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def publisher(store: Store, tmp_path: Path, *, age: float = 100.0, left: float = 100.0, threads: int = 2) -> Publisher:
    now = time.monotonic()
    config = SimpleNamespace(budget=age + left, threads=threads, labels=())
    context: Any = SimpleNamespace(config=config, deadline=now + left, work=tmp_path)
    return Publisher(store, context=context)


def found(tmp_path: Path, *milliseconds: float) -> Facts:
    """Facts of a search in which trials took so long, each an artifact of its own."""
    trials = []
    for p50 in milliseconds:
        folder = tmp_path / f"built-{p50}"
        built = open_artifact(folder) if folder.exists() else linear(folder)
        made = trial("eager", p50=p50)
        trials.append(msgspec.structs.replace(made, recipe=built.manifest.recipe, artifact=str(folder)))
    return made_facts(tuple(trials))


def served_ms(store: Store) -> float:
    timing = open_artifact(store.resolve("m")).manifest.timing
    assert timing is not None
    return timing.curve[0].p50_ms


def test_versions_on_the_way_are_better_by_a_tenth_and_make_room_for_each_other(store: Store, tmp_path: Path) -> None:
    ours = publisher(store, tmp_path)
    ours.offer(found(tmp_path, 10.0))
    assert served_ms(store) == 10.0
    ours.offer(found(tmp_path, 10.0, 9.5))
    assert served_ms(store) == 10.0, "not worth a version"
    ours.offer(found(tmp_path, 10.0, 9.5, 5.0))
    assert served_ms(store) == 5.0
    assert len(store.versions("m")) == 1
    last = found(tmp_path, 10.0, 9.5, 5.0, 4.9)
    assert last.winner is not None
    artifact, number = ours.finish(last, last.winner)
    assert store.versions("m") == (number,)
    assert artifact.manifest.timing == last.winner.timing
    assert (artifact.path / "report" / "report.html").is_file()


def test_the_end_is_told_in_full_where_the_version_on_the_way_had_won(store: Store, tmp_path: Path) -> None:
    ours, facts = publisher(store, tmp_path), found(tmp_path, 10.0)
    ours.offer(facts)
    first = store.current("m")
    assert facts.winner is not None
    _, number = ours.finish(facts, facts.winner)
    assert number > first
    assert store.versions("m") == (number,)
    _, again = publisher(store, tmp_path).finish(facts, facts.winner)
    assert again == number, "a rerun publishes nothing new"


def test_a_version_on_the_way_that_is_refused_after_all_is_taken_back(store: Store, tmp_path: Path) -> None:
    earlier, facts = publisher(store, tmp_path), found(tmp_path, 6.0)
    assert facts.winner is not None
    _, there = earlier.finish(facts, facts.winner)
    ours = publisher(store, tmp_path)
    few = found(tmp_path, 8.0, 3.0)
    few = msgspec.structs.replace(few, trials=tuple(_named(trial) for trial in few.trials))
    ours.offer(few)
    assert served_ms(store) == 3.0
    refused = msgspec.structs.replace(few.trials[1], status="refused")
    ours.offer(made_facts((few.trials[0], refused)))
    assert (store.versions("m"), served_ms(store)) == ((there,), 6.0)


def _named(trial: Trial) -> Trial:
    """The trial with a recipe of its own."""
    assert trial.timing is not None
    options: Options = {"threads": int(trial.timing.curve[0].p50_ms)}
    return msgspec.structs.replace(trial, recipe=msgspec.structs.replace(trial.recipe, options=options))


def test_what_others_published_stays_and_nothing_worse_replaces_it(store: Store, tmp_path: Path) -> None:
    earlier, facts = publisher(store, tmp_path), found(tmp_path, 6.0)
    assert facts.winner is not None
    _, there = earlier.finish(facts, facts.winner)
    ours = publisher(store, tmp_path)
    ours.offer(found(tmp_path, 8.0))
    assert served_ms(store) == 6.0
    publisher(store, tmp_path, threads=1).offer(found(tmp_path, 3.0))
    assert served_ms(store) == 6.0, "what was measured otherwise is not compared"
    ours.offer(found(tmp_path, 8.0, 3.0))
    assert served_ms(store) == 3.0
    last = found(tmp_path, 8.0, 3.0, 2.0)
    assert last.winner is not None
    _, number = ours.finish(last, last.winner)
    assert store.versions("m") == (there, number)


@pytest.mark.parametrize(("age", "left"), [(1.0, 100.0), (100.0, -1.0)])
def test_a_search_that_is_young_or_at_its_end_publishes_once(
    store: Store, tmp_path: Path, age: float, left: float
) -> None:
    publisher(store, tmp_path, age=age, left=left).offer(found(tmp_path, 10.0))
    assert store.versions("m") == ()
