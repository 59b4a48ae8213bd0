"""Journey: a process that enrols is killed with SIGKILL at any moment; nothing that it acknowledged is lost."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import numpy as np
import pytest

from torchship import process
from torchship_faces.gallery import Enrolment, Gallery


def vector_of(number: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.random.default_rng(number).standard_normal((1, 32), dtype=np.float32)


def enrol_for_ever(argument: dict[str, object]) -> None:
    """Runs in a child: enrols, forgets every tenth, compacts often, and writes each number once it is acknowledged."""
    gallery = Gallery(str(argument["root"]), model="m", width=32, exact_below=20)
    out, number = int(str(argument["out"])), int(str(argument["first"]))
    while True:
        gallery.enrol([Enrolment(person=f"p{number}", vectors=vector_of(number))])
        os.write(out, f"+{number}\n".encode())
        if number % 10 == 3:
            gallery.forget(f"p{number - 1}")
            os.write(out, f"-{number - 1}\n".encode())
        if number % 7 == 0:
            gallery.compact()
        number += 1


@pytest.mark.timeout(120)
def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    chance = random.Random(7)
    known: set[int] = set()
    first = 0
    for _ in range(8):
        inlet, outlet = os.pipe()
        child = process.spawn(
            "apps.faces.tests.journeys.test_gallery_crash:enrol_for_ever",
            argument={"root": str(tmp_path / "g"), "out": outlet, "first": first},
            fds=(outlet,),
            env={"PYTHONPATH": os.getcwd()},
        )
        os.close(outlet)
        head = os.read(inlet, 64)  # it is at work
        time.sleep(chance.uniform(0.0, 0.25))
        process.stop(child)
        with os.fdopen(inlet, "rb") as pipe:
            lines = (head + pipe.read()).decode().split()
        for line in lines:
            (known.add if line[0] == "+" else known.discard)(int(line[1:]))
        first = max(known) + 2  # one more may have been written without being acknowledged

        gallery = Gallery(tmp_path / "g", model="m", width=32, exact_below=20)
        held = {int(name[1:]) for name in gallery.page(limit=10**6)}
        unacknowledged = held - known
        missing = known - held
        assert missing <= {first - 3}, "only the one that was about to be forgotten may be gone"
        assert len(unacknowledged) <= 1
        known = held
        for number in sorted(held)[-20:]:
            best = gallery.nearest(vector_of(number))[0][0]
            assert (best.person, best.score > 0.99) == (f"p{number}", True)
        gallery.close()
        first = max(held) + 1
    assert len(known) > 30
    leftovers = [path.name for path in (tmp_path / "g").iterdir() if path.name.startswith(".")]
    assert leftovers == []
