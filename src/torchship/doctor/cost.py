"""Estimates what a module costs: FLOPs, parameters, activation memory, and which hardware features can speed it up."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

import msgspec
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from torchship.doctor.machine import fast_formats
from torchship.doctor.subject import Subject, call
from torchship.hardware import Hardware

_CONVOLUTIONS = ("convolution",)
_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "linear", "attention", "rnn")


class Cost(msgspec.Struct, frozen=True):
    """Of one row: `flops` (a multiply-add is two), shares of it in percent; sizes in bytes.

    `activations` is the largest total of tensors alive at once between operators, without the weights.
    """

    flops: int
    convolution: float
    product: float
    parameters: int
    weight_bytes: int
    activations: int
    rows: int
    usable: list[str] = []


def estimate(subject: Subject, *, hardware: Hardware) -> Cost:
    """Counted by running the example once under torch's FLOP counter, and once under a ledger of live tensors."""
    tensors = subject.tensors()
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its one operator for a whole layer is not counted
    try:
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mkldnn_rnn_layer: _recurrent}) as counter:
            call(subject.model.module, tensors)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    with torch.inference_mode(), _Ledger() as ledger:
        subject.model.module(*tensors)
    counts = {str(operator): int(count) for operator, count in counter.get_flop_counts().get("Global", {}).items()}
    convolution, product = _share(counts, _CONVOLUTIONS), _share(counts, _PRODUCTS)
    rows = int(tensors[0].shape[0]) if subject.model.signature.batched else 1
    weights = {tensor.data_ptr(): tensor for tensor in (*subject.module.parameters(), *subject.module.buffers())}
    return Cost(
        flops=sum(counts.values()) // rows,
        convolution=convolution,
        product=product,
        parameters=sum(tensor.numel() for tensor in subject.module.parameters()),
        weight_bytes=sum(tensor.nbytes for tensor in weights.values()),
        activations=ledger.most // rows,
        rows=rows,
        usable=_usable(subject.module, convolution, product, hardware),
    )


def _recurrent(given: Sequence[int], inward: Sequence[int], across: Sequence[int], *_: Any, **__: Any) -> int:
    """FLOPs of one fused recurrent layer, from the shapes of its input (steps, rows, width) and its two weights."""
    return 2 * given[0] * given[1] * (math.prod(inward) + math.prod(across))


def _share(counts: dict[str, int], names: Sequence[str]) -> float:
    """What operators with such names have of all FLOPs, in percent."""
    found = sum(count for name, count in counts.items() if any(word in name for word in names))
    return round(100 * found / sum(counts.values()), 1) if found else 0.0


def _usable(module: torch.nn.Module, convolution: float, product: float, hardware: Hardware) -> list[str]:
    """Which features of this machine the module can use, each in one line."""
    fast, heavy = fast_formats(hardware), convolution + product
    if heavy < 1:
        return ["no convolution or matrix product: memory speed decides, not arithmetic"]
    lines = []
    if "int8" in fast:
        kind = "static int8 with calibration" if convolution > product else "dynamic or static int8"
        lines.append(f"{fast['int8']}: {kind}, for the {heavy:.0f} % of the FLOPs in convolutions and matrix products")
    if "bf16" in fast:
        lines.append(f"{fast['bf16']}: bf16 without calibration, for the same {heavy:.0f} %")
    if "fp16" in fast and "Tensor" in fast["fp16"]:
        lines.append(f"{fast['fp16']}: fp16, {_aligned(module):.0f} % of the layers have channels in multiples of 8")
    if not fast:
        lines.append("this processor has no fast int8, bf16 or fp16: gains come from fusion and layout only")
    return lines


def _aligned(module: torch.nn.Module) -> float:
    """The share of convolution and linear layers whose channels Tensor Cores take without padding, in percent."""
    layers = [part.weight.shape[:2] for part in module.modules() if isinstance(part, torch.nn.Linear | torch.nn.Conv2d)]
    return 100 * sum(all(size % 8 == 0 for size in shape) for shape in layers) / max(len(layers), 1)


class _Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds the bytes of each new storage up, and takes them off when its last tensor dies."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._held: dict[int, list[int]] = {}
        self._now = 0
        self.most = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = operator(*args, **(kwargs or {}))
        given = {id(value) for value in args if isinstance(value, torch.Tensor)}
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, torch.Tensor) and id(tensor) not in given:
                self._enter(tensor)
        return output

    def _enter(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._held:
            self._held[key] = [storage.nbytes(), 0]
            self._now += storage.nbytes()
        self._held[key][1] += 1
        weakref.finalize(tensor, self._leave, key)
        self.most = max(self.most, self._now)

    def _leave(self, key: int) -> None:
        self._held[key][1] -= 1
        if self._held[key][1] == 0:
            self._now -= self._held.pop(key)[0]
