"""What every test may rely on, however the suite was started."""

from __future__ import annotations

import signal
import sys


def pytest_configure() -> None:
    """A shell starts background jobs with SIGINT ignored, and children inherit that: Ctrl-C is tested, so undo it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_sessionfinish() -> None:
    """Stop what the protocols are tested on, where a test has started it."""
    if running := sys.modules.get("tests.unit.protocols.running"):
        running.close()
