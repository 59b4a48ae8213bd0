"""A worker that a library kills: its station says which one."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from torchship.errors import StageFailed
from torchship.pipeline.config import convert
from torchship.pipeline.planning import plan
from torchship.serve.engine.line import Line


def test_a_worker_that_dies_of_an_unknown_instruction_names_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site-packages" / "standin"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("def call():\n    import os\n    os.kill(os.getpid(), 4)\n")
    (tmp_path / "site-packages" / "needs_standin.py").write_text(
        "import standin\nfrom torchship.stage import stage\n\n@stage('x:FP32[1] -> y:FP32[1]')\n"
        "def calling(x):\n    standin.call()\n    return x\n"
    )
    monkeypatch.syspath_prepend(str(package.parent))

    async def work() -> None:
        line = await Line(plan(convert({"name": "test", "stages": [{"run": "needs_standin:calling"}]}))).open()
        with pytest.raises(StageFailed, match="killed by SIGILL: standin was built for a newer processor"):
            await line.submit({"x": np.array([1], np.float32)})
        await line.close(grace=1.0)

    asyncio.run(work())
