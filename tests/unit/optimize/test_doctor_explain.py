"""What the doctor makes of logs of classic run-time failures; test_doctor_catalog has one for each."""

from __future__ import annotations

import io
import sys

import pytest

from torchship.doctor.catalog import tables
from torchship.doctor.explain import explain

_LOGS = {row.name: row.test.text for row in tables().failure if row.test}
_OUT_OF_MEMORY = _LOGS["CUDA out of memory"]


def test_out_of_memory_computes_a_batch_that_fits() -> None:
    mend = explain(_OUT_OF_MEMORY)[0].mend
    # 16 in use + 4 free + 0.5 idle = 20.5 of the 24 GiB that were needed: 64 * 20.5 / 24 * 0.9
    assert mend[0].startswith("batch size 49 instead of 64")
    assert "24.00 GiB were needed, 20.50 GiB are there" in mend[0]
    assert any("8.00 GiB instead of 16.00 GiB" in line for line in mend)


def test_out_of_cuda_memory_is_not_taken_for_a_killed_process() -> None:
    assert [known.name for known in explain("torch.OutOfMemoryError: " + _OUT_OF_MEMORY)] == ["CUDA out of memory"]


def test_out_of_memory_without_a_batch_size_gives_a_share() -> None:
    text = _OUT_OF_MEMORY.replace("batch_size=64", "")
    assert explain(text)[0].mend[0].startswith("a batch at most 77% as large")


def test_idle_pieces_are_told_apart_from_a_full_card() -> None:
    text = _OUT_OF_MEMORY.replace("0.50 GiB is reserved", "9.50 GiB is reserved")
    assert "expandable_segments" in explain(text)[0].mend[0]


def test_an_exception_is_read_with_its_causes() -> None:
    fault = RuntimeError("the loader stopped")
    fault.__cause__ = OSError("[Errno 24] Too many open files")
    assert [found.name for found in explain(fault)] == ["too many open files"]


def test_an_innocent_log_has_no_explanation() -> None:
    assert explain("epoch 1 loss 0.3\nepoch 2 loss 0.2\nserving on port 8000\n") == []


def test_the_command_explains_standard_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchship.cli.doctor import command

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(_LOGS["library missing"].encode())))
    assert command.main(["--explain", "-"], standalone_mode=False) == 0
    shown = capsys.readouterr().out
    assert "library missing" in shown
    assert "libgl1" in shown
    assert "missing: libGL.so.1" in shown
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"all is well")))
    assert command.main(["--explain", "-"], standalone_mode=False) == 1
