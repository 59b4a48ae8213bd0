"""The long benchmarks of the line in their shortest form: kills, reloads, and hours of use in seconds."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "words", "zero"),
    [
        ("chaos", ("--seconds", "4", "--every", "0.5"), ("lost", "crossed")),
        ("reload", ("--seconds", "4", "--callers", "4"), ("errors", "crossed")),
        ("soak", ("--minutes", "0.1", "--callers", "2"), ("lost", "crossed")),
    ],
)
def test_nothing_is_lost(name: str, words: tuple[str, ...], zero: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *words],
        cwd=ROOT, check=False, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "server's exit code: 0; orphans: none; leftovers: none" in done.stdout, done.stdout + done.stderr
    last = dict(re.findall(r"(\w+)=([\d.]+)", done.stdout.splitlines()[-1]))
    assert int(last["answered"]) > 20
    assert [last[key] for key in zero] == ["0"] * len(zero), done.stdout
    assert last["sent"] == last["answered"] or name == "chaos"
