"""Classic run-time failures, as their logs really read, and what the doctor makes of them."""

from __future__ import annotations

import io
import sys

import pytest

from torchship.doctor.explain import KNOWN_FAILURES, explain

_OUT_OF_MEMORY = (
    "batch_size=64\nTraceback (most recent call last):\n"
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 8.00 GiB. GPU 0 has a total capacity of 23.69 GiB "
    "of which 4.00 GiB is free. Process 1 has 19.69 GiB in use. Of the allocated memory 16.00 GiB is allocated by "
    "PyTorch, and 0.50 GiB is reserved by PyTorch but unallocated. If reserved but"
)
_LOGS = {
    "CUDA out of memory": _OUT_OF_MEMORY,
    "forked CUDA context": "RuntimeError: Cannot re-initialize CUDA in forked subprocess. To use CUDA",
    "shared memory is too small": "ERROR: Unexpected bus error encountered in worker.\nBus error (core dumped)",
    "DataLoader worker killed": "RuntimeError: DataLoader worker (pid 31) is killed by signal: Killed. ",
    "killed for memory": "RuntimeError: [enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory",
    "no kernel for this GPU": "CUDA error: no kernel image is available for execution on the device",
    "driver too old": "CUDA driver version is insufficient for CUDA runtime version",
    "GLIBC missing": "ImportError: /lib/x86_64-linux-gnu/libc.so.6: version `GLIBC_2.38' not found (required by x.so)",
    "instruction missing": "Illegal instruction (core dumped)",
    "ABI mismatch": "ImportError: torchvision/_C.so: undefined symbol: _ZN3c106detail14torchCheckFailE",
    "ONNX opset unsupported": "Fatal error: ONNX Runtime only *guarantees* support for models stamped with "
    "official released onnx opset versions. Current official support for domain ai.onnx is till opset 21.",
    "dtype mismatch": "RuntimeError: expected scalar type Float but found Double",
    "tensors on different devices": "RuntimeError: Expected all tensors to be on the same device, but found",
    "weights do not fit": "RuntimeError: Error(s) in loading state_dict for ResNet:\n Missing key(s)",
    "unsafe weights file": "_pickle.UnpicklingError: Weights only load failed. This file can still be loaded",
    "too many threads": "libgomp: Thread creation failed: Resource temporarily unavailable",
    "too many open files": "OSError: [Errno 24] Too many open files",
    "no compiler": "torch._inductor.exc.InvalidCxxCompiler: No working C++ compiler found in config.cpp.cxx",
    "library missing": "ImportError: libGL.so.1: cannot open shared object file: No such file or directory",
    "port in use": "OSError: [Errno 98] error while attempting to bind: Address already in use",
    "device-side assert": "CUDA error: device-side assert triggered",
    "crash in native code": "Segmentation fault (core dumped)",
}


@pytest.mark.parametrize("name", [known.name for known in KNOWN_FAILURES])
def test_every_known_failure_is_recognised_by_its_own_log(name: str) -> None:
    found = explain(f"INFO starting\n{_LOGS[name]}\n")
    assert name in [explanation.name for explanation in found]
    explanation = next(explanation for explanation in found if explanation.name == name)
    assert explanation.mend
    assert explanation.line in _LOGS[name]


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
