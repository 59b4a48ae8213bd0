"""Journey: a process that keeps identities is killed again and again; each time it comes back with what it had."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from apps.video.tests.identity_kit import gallery

ROOT = Path(__file__).parents[4]
WORKS = """
import random, sys
from apps.video.tests.identity_kit import gallery, looks, see
identities, time = gallery(sys.argv[1]), float(sys.argv[2])
while True:
    time += 1
    person = random.randrange(12)
    see(identities, random.choice("abc"), int(time), person, time, crop=b"picture %d" % person)
    if random.random() < 0.2 and len(identities.numbers()) > 3:
        identities.forget(random.choice(identities.numbers()))
    elif random.random() < 0.3:
        numbers = identities.numbers()
        serials = {n: [v.serial for v in identities.visits(n)] for n in numbers}
        split = [n for n in numbers if len(serials[n]) > 1]
        if split:
            identities.split(split[0], serials[split[0]][:1])
    identities.flush()
    print(time, flush=True)
"""


def test_a_killed_process_comes_back_with_its_identities(tmp_path: Path) -> None:
    start, seen = 0.0, 0
    for round_ in range(6):
        command = [sys.executable, "-c", WORKS, str(tmp_path), str(start)]
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        for _ in range(10 + 5 * round_):
            start = float(child.stdout.readline())
        time.sleep(0.003 * round_)
        child.send_signal(signal.SIGKILL)
        child.communicate(timeout=10)
        start += 100
        again = gallery(tmp_path)
        numbers = again.numbers()
        seen = max(seen, len(numbers))
        visits = [visit for number in numbers for visit in again.visits(number)]
        assert len({visit.serial for visit in visits}) == len(visits), "a visit belongs to one identity"
        for number in numbers:
            mine = again.visits(number)
            assert mine, "no identity without a visit"
            assert not [(a, b) for a in mine for b in mine if a is not b and a.meets(b)]
        again.close()
        assert not list(tmp_path.glob(".*"))
    assert seen > 3
