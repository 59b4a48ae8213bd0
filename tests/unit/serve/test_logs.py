"""The log's two forms: what a caller sends cannot make lines of its own, nor very long ones."""

from __future__ import annotations

import json
import logging
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
