"""The log's two forms: what a caller sends cannot make lines of its own, nor very long ones."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
import threading
import time
from typing import Literal

import pytest

from torchship.serve.config import Logs
from torchship.serve.logs import begin


@pytest.mark.parametrize("form", ["text", "json"])
def test_one_record_is_one_line(form: Literal["text", "json"], capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("torchship")
    before = logger.handlers[:], logger.level, logger.propagate
    try:
        begin(Logs(format=form))
        logging.getLogger("torchship.serve").warning(
            "request %s", "a\n12:00:00 error forged \x1b[31m\u2028" + "x" * 9000
        )
        logger.handlers[0].flush()
        (line,) = capsys.readouterr().err.rstrip("\n").split("\n")
    finally:
        logger.handlers[:], logger.level, logger.propagate = before
    assert len(line) < 4500
    said = json.loads(line)["message"] if form == "json" else line
    assert ("\\n12:00:00 error" in said) == (form == "text")
    assert form == "json" or "\x1b" not in line


class Stuck(io.StringIO):
    """A terminal that nobody reads until a test does."""

    def __init__(self) -> None:
        super().__init__()
        self.read_on = threading.Event()

    def write(self, text: str) -> int:
        self.read_on.wait(30)
        return super().write(text)


def test_a_log_that_nobody_reads_holds_up_nobody_and_says_what_it_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    logger, out = logging.getLogger("torchship"), Stuck()
    before = logger.handlers[:], logger.level, logger.propagate
    monkeypatch.setattr(sys, "stderr", out)
    try:
        begin(Logs())
        for number in range(12_000):  # returns, though not one line can be written
            logger.info("line %d", number)
        out.read_on.set()
        logger.info("the last")
        logger.handlers[0].close()  # after what is queued
        for _ in range(1000):
            if "were dropped" in out.getvalue():
                break
            time.sleep(0.01)
    finally:
        logger.handlers[:], logger.level, logger.propagate = before
    text = out.getvalue()
    shown = sum("info" in line and "line " in line for line in text.splitlines())
    (told,) = re.findall(r"(\d+) lines of the log were dropped", text)
    assert shown + ("the last" in text) + int(told) == 12_001
    assert "line 0\n" in text
