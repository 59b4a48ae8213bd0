"""What the doctor says of cards: memory and its holders, why torch sees none, the self-test, and what is missing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from torchship import process
from torchship.doctor import card, machine
from torchship.doctor.card import CardCheck, CardReport, CardUse
from torchship.doctor.machine import Fact, Machine
from torchship.hardware import Gpu, Hardware
from torchship.process import Outcome

H200 = Gpu("NVIDIA H200", 140 * 2**30, "9.0", "580.159.04")
GOOD = CardReport("2.11.0", "13.0", 1, "", [CardCheck("product", 0.4, "720 TFLOP/s in fp16")])


def examined(
    monkeypatch: pytest.MonkeyPatch, *, report: CardReport = GOOD, uses: tuple[CardUse, ...] = (), packages: str = ""
) -> tuple[Machine, dict[str, Fact]]:
    """A machine with one H200 and these packages."""
    installed = {"torch": "2.11.0", **dict.fromkeys(packages.split(), "1.0")}
    monkeypatch.setattr(machine, "here", lambda: Hardware("x86_64", "Xeon", 16, 2**37, (), (H200,)))
    monkeypatch.setattr(machine, "version", lambda name: installed.get(name, ""))
    monkeypatch.setattr(card, "look", lambda: report)
    monkeypatch.setattr(card, "uses", lambda: list(uses))
    found = machine.examine()
    return found, {fact.name: fact for fact in found.facts}


def test_a_sound_card(monkeypatch: pytest.MonkeyPatch) -> None:
    use = CardUse(137 * 2**30, ("python (4711) 2.1 GiB",))
    found, facts = examined(monkeypatch, uses=(use,))
    assert facts["memory of card 0"] == Fact(
        "memory of card 0", "137.0 of 140.0 GiB free; held by python (4711) 2.1 GiB"
    )
    assert facts["torch on cards"] == Fact("torch on cards", "torch 2.11.0 for CUDA 13.0, sees 1 of 1")
    assert found.checks == GOOD.checks
    assert not any("OpenVINO" in line for line in found.advice), "there is a card"


def test_a_full_or_a_cut_card_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    _, facts = examined(monkeypatch, uses=(CardUse(2**30, ("trainer (7) 139.0 GiB",), mig=True),))
    assert facts["memory of card 0"].level == "warn"
    assert "trainer (7)" in facts["memory of card 0"].value
    assert "MIG" in facts["memory of card 0"].value
    assert "memory_share" in facts["memory of card 0"].advice


@pytest.mark.parametrize(
    ("report", "visible", "value", "advice"),
    [
        (CardReport("2.14.0+cpu"), None, "2.14.0+cpu is a build for the processor", "download.pytorch.org"),
        (CardReport("2.11.0", "13.0", 0, "no CUDA GPUs are available"), "", "CUDA_VISIBLE_DEVICES=", "unset it"),
        (CardReport("2.11.0", "13.0", 0, "RuntimeError: The NVIDIA driver on your system is too old (found 12020)"),
         None, "sees 0 of 1: RuntimeError: The NVIDIA driver", "update the driver"),
        (CardReport("2.11.0", "13.0", 0, "RuntimeError: unknown error"), None, "unknown error", "--gpus all"),
        (CardReport(fault="product: killed by SIGSEGV"), None, "ended: product: killed by SIGSEGV", ""),
    ],
)  # fmt: skip
def test_why_torch_does_not_see_the_card(
    report: CardReport, visible: str | None, value: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found, facts = examined(monkeypatch, report=report)
    assert facts["torch on cards"].level == "bad"
    assert value in facts["torch on cards"].value
    assert advice in facts["torch on cards"].advice
    assert not advice or facts["torch on cards"].advice in found.advice


def test_a_step_that_fails_brings_its_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    words = "AcceleratorError: CUDA error: no kernel image is available for execution on the device"
    checks = [CardCheck("product", 0.1, fault=words), CardCheck("graph capture", 0.1, "captured and replayed")]
    found, _ = examined(monkeypatch, report=CardReport("2.11.0", "13.0", 1, "", checks))
    assert any("pytorch.org/get-started" in line for line in found.advice)


def test_what_is_missing_is_told_with_what_it_would_bring(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = "onnxruntime-gpu", "torchship[gpu]", "nvidia-ml-py", "install triton"
    found, _ = examined(monkeypatch, packages="onnxruntime")
    assert [word for word in lacking if any(word in line for line in found.advice)] == list(lacking)
    found, _ = examined(monkeypatch, packages="onnxruntime-gpu nvidia-ml-py nvidia-cudnn-frontend triton")
    assert not any(word in line for word in lacking for line in found.advice)
    found, _ = examined(monkeypatch)
    assert not any("onnxruntime-gpu" in line for line in found.advice), "who has no onnxruntime does not miss it"


def test_nvidia_smi_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "nvidia-smi"
    file.write_text(
        '#!/bin/sh\ncase "$1" in\n'
        "--query-gpu=*) echo 'GPU-a, 140000, [N/A]'; echo 'GPU-b, 1000, Enabled'; echo 'GPU-c, [N/A], [N/A]';;\n"
        "*) echo 'GPU-a, 4711, /usr/bin/python3, 2048'; echo 'GPU-a, 12, [Not Found], [N/A]'; echo 'odd';;\nesac\n"
    )
    file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    holders = "python3 (4711) 2.0 GiB", "[Not Found] (12) some"
    assert card.uses() == [CardUse(140000 * 2**20, holders), CardUse(1000 * 2**20, (), mig=True)]
    file.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    assert card.uses() == []


def test_the_child_says_which_step_it_died_in(monkeypatch: pytest.MonkeyPatch) -> None:
    log = "card step: import torch\nwhatever\ncard step: product\ncard step: graph capture\nSegmentation fault"
    monkeypatch.setattr(process, "run", lambda *_, **__: Outcome(fault="killed by SIGSEGV", log=log))
    assert card.look() == CardReport(fault="graph capture: killed by SIGSEGV")
    monkeypatch.setattr(process, "run", lambda *_, **__: Outcome(fault="did not finish within 60 s"))
    assert card.look() == CardReport(fault="torch: did not finish within 60 s")


def test_a_step_is_timed_and_what_it_raises_is_its_verdict() -> None:
    good, bad = card._check("good", lambda: "seen"), card._check("bad", lambda: str(1 // 0))
    assert (good.name, good.said, good.fault) == ("good", "seen", "")
    assert bad.fault == "ZeroDivisionError: integer division or modulo by zero"


def test_a_real_child_reports() -> None:
    torch = pytest.importorskip("torch")
    found = card.look()
    assert found.torch == str(torch.__version__)
    assert found.cuda == str(torch.version.cuda or "")
    assert bool(found.checks) == torch.cuda.is_available()
    assert found.checks or found.fault
