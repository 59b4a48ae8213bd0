"""Publishes what a search finds: its best so far while it runs, and its winner in the end."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec

from torchship import plugins
from torchship.artifact import Artifact, Store, open_artifact, package
from torchship.artifact import folder as folders
from torchship.artifact.manifest import Manifest
from torchship.optimize.attempt import SearchContext
from torchship.optimize.choose import accelerated, baseline, cost, is_valid, price
from torchship.optimize.facts import Facts
from torchship.optimize.report import Report
from torchship.optimize.trial import Trial
from torchship.recipe import Recipe

YOUNG_S = 20.0  # a search that is done sooner has one version
_BETTER = 0.9  # of the cost of what is current: less of a gain is worth no version


class Publisher:
    """Publishes to a store for one search.

    On the way a version is published when the best so far costs a tenth less, by the goal, than what is current under
    that name as it was measured with as many threads: servers that watch the store get better, never worse, and a
    search that is killed leaves what it had. One such version is there at a time; the last goes when the winner comes,
    or when it is refused after all, on more rows.
    """

    def __init__(self, store: Store | Path | str | None, *, context: SearchContext) -> None:
        self._store = store if isinstance(store, Store) else Store(store)
        self._context = context
        self._version, self._recipe = 0, baseline()  # the one on the way, and what it is

    def offer(self, facts: Facts) -> None:
        """Publish the best so far where that is worth a version."""
        config, now = self._context.config, time.monotonic()
        if any(trial.recipe == self._recipe and not is_valid(trial) for trial in facts.trials):
            self._remove(facts.name, self._version)
            self._version = 0
        old_enough = now - self._context.deadline + config.budget >= YOUNG_S
        if facts.winner is None or not old_enough or now > self._context.deadline:
            return
        there = self._current(facts.name)
        if there is not None:
            timing = there.timing
            if timing is None or timing.threads != config.threads:
                return
            if cost(facts.winner, goal=facts.goal) > _BETTER * price(timing, goal=facts.goal):
                return
        self._replace(facts, facts.winner)

    def finish(self, facts: Facts, winner: Trial) -> tuple[Artifact, int]:
        """Publish the winner.

        Where the current version is this very trial, it stays: a rerun out of the cache publishes nothing new.
        """
        there, known = self._current(facts.name), self._version
        if there is not None and self._store.current(facts.name) != known:
            made = open_artifact(winner.artifact, verify=False).manifest.provenance.model_hash
            before = (there.recipe, there.timing, there.verdict, there.provenance.model_hash, there.labels)
            labels = tuple(self._context.config.labels)
            if before == (winner.recipe, winner.timing, _plain(winner).verdict, made, labels):
                number = self._store.current(facts.name)
                return self._opened(facts.name, number), number
        number = self._replace(facts, winner)
        return self._opened(facts.name, number), number

    def _current(self, name: str) -> Manifest | None:
        if not self._store.versions(name):
            return None
        return self._opened(name, self._store.current(name)).manifest

    def _opened(self, name: str, number: int) -> Artifact:
        return open_artifact(self._store.resolve(f"{name}@{number}"), verify=False)

    def _replace(self, facts: Facts, winner: Trial) -> int:
        """Publish the winner so far, then remove the version that was published on the way before."""
        with TemporaryDirectory(prefix="winner-", dir=self._context.work) as place:
            folder = Path(place) / "artifact"
            _packed(facts, winner, folder, labels=self._context.config.labels)
            number = self._store.publish(folder, name=facts.name)
        before, self._version, self._recipe = self._version, number, winner.recipe
        self._remove(facts.name, before)
        return number

    def _remove(self, name: str, version: int) -> None:
        if version in self._store.versions(name):
            self._store.remove(name, version=version)


def _packed(facts: Facts, winner: Trial, folder: Path, *, labels: Sequence[str]) -> None:
    """Copy the winner, and add what was measured, its own answers and the report."""
    shutil.copytree(winner.artifact, folder)
    answers = Path(f"{winner.artifact}.answers")
    if answers.is_file():
        folders.write(folder / "examples" / "outputs.safetensors", answers.read_bytes())
    Report(facts).save(folder / "report")
    found = _plain(winner)
    served = found.timing and found.timing.served
    capped = {"max_batch": served.max_batch} if served else {}
    package.amend(folder, name=facts.name, timing=found.timing, verdict=found.verdict, labels=tuple(labels), **capped)
    spare = portable([facts.trials[index] for index in facts.choice.ranking])
    if spare is not None:
        package.add_fallback(folder, other=spare.artifact)


def _plain(winner: Trial) -> Trial:
    """With the numbers and the sentence of the verdict alone, as every reader of the manifest knows them."""
    verdict = winner.verdict and msgspec.structs.replace(winner.verdict, evidence=None)
    return msgspec.structs.replace(winner, verdict=verdict)


def portable(ranking: Sequence[Trial]) -> Trial | None:
    """The best trial that opens on any machine, where the winner (the first) is native or needs a card."""
    found = next((trial for trial in ranking if _opens_anywhere(trial.recipe)), None)
    return None if found is ranking[0] else found


def _opens_anywhere(recipe: Recipe) -> bool:
    return plugins.load("backends", name=recipe.backend).KIND != "native" and not accelerated(recipe)
