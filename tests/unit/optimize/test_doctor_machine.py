"""The examination of this machine: it needs no torch, never fails, and warns where something is too small."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
import pytest

from torchship import plugins
from torchship.doctor import machine
from torchship.hardware import Gpu, Hardware, here


class _Usage(NamedTuple):
    total: int
    used: int
    free: int


def _facts(found: machine.Machine) -> dict[str, machine.Fact]:
    return {fact.name: fact for fact in found.facts}


def test_every_backend_is_listed_with_a_reason_or_none() -> None:
    found = machine.examine()
    assert [row.name for row in found.backends] == plugins.names("backends")
    assert found.hardware == here()
    assert found.fingerprint == here().fingerprint


def test_a_backend_that_raises_while_probing_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "names", lambda kind: ["broken"])

    def load(kind: str, *, name: str) -> Any:
        raise OSError("libbroken.so: cannot open")

    monkeypatch.setattr(plugins, "load", load)
    (row,) = machine.examine().backends
    assert row == machine.BackendRow("broken", "OSError: libbroken.so: cannot open")


def test_too_many_threads_are_reported_with_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "512")
    found = machine.examine()
    assert _facts(found)["threads"].level == "warn"
    assert any("OMP_NUM_THREADS" in line for line in found.advice)


def test_small_shared_memory_and_a_full_disk_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: _Usage(64 * 2**20, 0, 64 * 2**20))
    found = _facts(machine.examine())
    assert found["/dev/shm"].level == "warn"
    assert "--shm-size" in found["/dev/shm"].advice
    assert any(name.startswith("disk") and fact.level == "warn" for name, fact in found.items())


def test_no_shared_memory_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[[str], Any] = shutil.disk_usage

    def usage(path: str) -> Any:
        if path == "/dev/shm":
            raise FileNotFoundError(path)
        return real(path)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert _facts(machine.examine())["/dev/shm"].level == "bad"


def test_a_quota_below_the_cores_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "quota", lambda: 0.5)
    found = _facts(machine.examine())["cores"]
    assert found.level == "warn"
    assert "--threads 1" in found.advice


def test_cores_are_written_as_ranges() -> None:
    assert machine._ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert machine._ranges([]) == ""


def _hardware(machine_name: str, *present: str, gpus: tuple[Gpu, ...] = ()) -> Hardware:
    return Hardware(machine_name, "test", 2, 2**34, present, gpus)


def test_features_name_what_they_are_good_for() -> None:
    found = {row.name: row for row in machine.features(_hardware("x86_64", "avx2", "avx512_vnni"))}
    assert found["avx512_vnni"].present
    assert not found["amx_int8"].present
    assert all(row.use for row in found.values())
    assert {row.name for row in machine.features(_hardware("aarch64", "asimddp"))} >= {"asimddp", "i8mm", "sve"}
    assert machine.features(_hardware("riscv64")) == []


def test_tensor_cores_follow_the_compute_capability() -> None:
    card = Gpu("H100", 80 * 2**30, "9.0")
    present = {row.name for row in machine.tensor_cores(card) if row.present}
    assert present == {"fp16", "int8", "bf16/tf32", "fp8"}
    assert machine.tensor_cores(Gpu("odd", 0, "[N/A]")) == []


def test_fast_formats_name_the_best_feature() -> None:
    xeon = _hardware("x86_64", "amx_int8", "avx512_bf16", "avx512_vnni")
    assert machine.fast_formats(xeon) == {"int8": "amx_int8", "bf16": "avx512_bf16"}
    card = _hardware("x86_64", gpus=(Gpu("T4", 2**34, "7.5"),))
    assert set(machine.fast_formats(card)) == {"int8", "fp16"}


def test_the_command_prints_json_that_reads_back_and_imports_no_torch() -> None:
    code = (
        "import sys\n"
        "from torchship.cli import app\n"
        "app.main(['doctor', '--json'], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules, 'doctor imported torch'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    found = msgspec.convert(json.loads(done.stdout), machine.Machine)
    assert found.hardware.cores == here().cores


def test_the_command_prints_tables(capsys: pytest.CaptureFixture[str]) -> None:
    from torchship.cli.doctor import command

    command.main([], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "This machine" in shown
    assert "/dev/shm" in shown
    assert here().fingerprint in shown
