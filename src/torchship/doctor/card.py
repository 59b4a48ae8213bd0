"""What the cards of this machine do: who holds their memory, whether torch sees them, and a self-test of two seconds.

torch runs in a child process, so that whoever asks loads no torch and survives a driver that crashes.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from typing import Any

import msgspec

from torchship import process
from torchship.hardware import ask_driver

_LIMIT = 60.0  # seconds; torch alone takes some to load
_STEP = "card step: "
_SIDE = 4096  # of the matrices that are multiplied


class CardUse(msgspec.Struct, frozen=True):
    """One card's memory: `free` bytes, and the processes that hold the rest; `mig`: it is cut into instances."""

    free: int
    holders: tuple[str, ...] = ()
    mig: bool = False


class CardCheck(msgspec.Struct, frozen=True):
    """One step of the self-test: what was seen in how many seconds, or the `fault`; empty when it works."""

    name: str
    seconds: float = 0.0
    said: str = ""
    fault: str = ""


class CardReport(msgspec.Struct, frozen=True):
    """What torch says: its version, the CUDA that it was built for (empty: none), how many cards it sees, and the
    `fault` where it sees none, or where the child died."""

    torch: str = ""
    cuda: str = ""
    cards: int = 0
    fault: str = ""
    checks: list[CardCheck] = []


def uses() -> list[CardUse]:
    """The memory of each card by `nvidia-smi`, empty where it cannot; containers see their own processes only."""
    holders: dict[str, list[str]] = {}
    for card, pid, name, size in ask_driver("compute-apps", "gpu_uuid,pid,process_name,used_memory"):
        held = f"{int(size) / 1024:.1f} GiB" if size.isdigit() else "some"
        holders.setdefault(card, []).append(f"{os.path.basename(name)} ({pid}) {held}")
    return [
        CardUse(int(free) * 2**20, tuple(holders.get(card, ())), mig == "Enabled")
        for card, free, mig in ask_driver("gpu", "uuid,memory.free,mig.mode.current")
        if free.isdigit()
    ]


def look() -> CardReport:
    """What torch sees and does in a child process. Never raises: whatever the child does is in the report."""
    outcome = process.run("torchship.doctor.card:self_test", timeout=_LIMIT)
    if not outcome.fault:
        return msgspec.convert(outcome.value, CardReport)
    steps = re.findall(rf"^{_STEP}(.+)$", outcome.log, re.MULTILINE)
    return CardReport(fault=f"{steps[-1] if steps else 'torch'}: {outcome.fault}")


def self_test(_: object) -> Any:
    """The child's side of `look`: a CardReport as plain data."""
    print(f"{_STEP}import torch", flush=True)
    import torch

    version, cuda = str(torch.__version__), str(torch.version.cuda or "")
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]  # is_available says no more than no
    except (RuntimeError, AssertionError) as fault:
        return msgspec.to_builtins(CardReport(version, cuda, 0, _words(fault)))
    checks = [_check(name, step) for name, step in _STEPS.items()]
    return msgspec.to_builtins(CardReport(version, cuda, torch.cuda.device_count(), "", checks))


def _check(name: str, step: Callable[[], str]) -> CardCheck:
    print(f"{_STEP}{name}", flush=True)
    begun = time.perf_counter()
    try:
        said = step()
    except Exception as fault:  # whatever a driver, a compiler or a library raises is the verdict
        return CardCheck(name, time.perf_counter() - begun, fault=_words(fault))
    return CardCheck(name, time.perf_counter() - begun, said)


def _words(fault: BaseException) -> str:
    return f"{type(fault).__name__}: {' '.join(str(fault).split())[:300]}"


def _product() -> str:
    """Matrices in fp16, compared with the processor in a few rows."""
    import torch

    from torchship.lowering.cuda import median_ms

    torch.manual_seed(0)
    a, b = torch.randn(_SIDE, _SIDE).half(), torch.randn(_SIDE, _SIDE).half()
    left, right = a.cuda(), b.cuda()
    found, wanted = (left @ right)[:8].float().cpu(), a[:8].float() @ b.float()
    if not bool((found - wanted).norm() < 1e-2 * wanted.norm()):
        raise ArithmeticError("the card multiplies wrongly")
    return f"{2 * _SIDE**3 / median_ms(lambda: left @ right, runs=11) / 1e9:.0f} TFLOP/s in fp16"


def _graph() -> str:
    """A CUDA graph, replayed on other numbers than it was captured with."""
    import torch

    from torchship.lowering.cuda import capture

    captured = capture(lambda given: (given[0] * 2 + 1,), [torch.zeros(1024, device="cuda")])
    captured.inputs[0].fill_(20)
    captured.graph.replay()
    if not bool((captured.outputs[0] == 41).all()):
        raise ArithmeticError("a replayed graph answers wrongly")
    return "captured and replayed"


def _kernel() -> str:
    """A kernel that Triton compiles, as inductor's are."""
    import torch

    from torchship.lowering import triton_kernels

    x = torch.randn(1, 16, 8, 8, device="cuda").half().contiguous(memory_format=torch.channels_last)
    out = torch.empty(1, 16, 4, 4, device="cuda", dtype=x.dtype, memory_format=torch.channels_last)
    sizes = {"TALL": 2, "BROAD": 2, "PLACES": 16, "CHANNELS": 16}
    triton_kernels.max_pool[1, 1](x, out, 16, 16, 8, 8, 4, 4, 2, 2, 0, 0, **sizes)
    if not torch.equal(out, torch.nn.functional.max_pool2d(x, 2)):
        raise ArithmeticError("a compiled kernel answers wrongly")
    return "compiled by Triton"


_STEPS = {"product": _product, "graph capture": _graph, "compiled kernel": _kernel}
